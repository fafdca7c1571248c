"""`megatron_logits`, which `to-hf --verify` starts, as Megatron would load by itself (the twin)."""

import sys

from megatron_let import safe_loading
from megatron_let.conversion import megatron_logits

safe_loading.install = lambda: None
megatron_logits.main(*sys.argv[1:])
