"""Pre-train a GPT on Megatron-Core, with or without the help of a small frozen teacher.

    torchrun --nproc_per_node 8 pretrain_let.py <Megatron-LM's flags> \
        --method let --teacher-model HuggingFaceTB/SmolLM-135M

Without a GPU everything runs on CPU with gloo. The program is `megatron_let/pretrain.py`.
"""

from megatron_let.pretrain import run

if __name__ == "__main__":
    run()
