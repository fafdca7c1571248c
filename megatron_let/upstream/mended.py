"""What is mended in Megatron for every run, whatever it runs on."""

from megatron_let.upstream import datasets, norms, optimizers, secrets
from megatron_let.upstream.table import apply

REDIRECTS = [
    *secrets.REDIRECTS,
    *datasets.REDIRECTS,
    *norms.REDIRECTS,
    *optimizers.REDIRECTS,
]


def mend_megatron() -> None:
    """Put it in place; before the command line is parsed."""
    apply(REDIRECTS)
