"""`megatron_logits`, which `to-hf --verify` starts, as Megatron would load by itself (the twin)."""

import sys

from megatron_let.conversion import megatron_logits
from megatron_let.upstream import safe_loading

safe_loading.install = lambda: None
megatron_logits.main(*sys.argv[1:])
