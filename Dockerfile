# A container for GPUs: NVIDIA's image has torch, Transformer Engine and Apex. Not built by CI, and not tested:
# what was run on a GPU is in docs/tested_on.md.
#
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch:<a tag with Python 3.12> -t megatron_let .
#   docker run --gpus all --ipc host --ulimit memlock=-1 megatron_let torchrun --nproc_per_node 8 pretrain_let.py ...
ARG BASE=nvcr.io/nvidia/pytorch:25.09-py3
FROM ${BASE}
WORKDIR /opt/megatron_let
COPY . .
# The image's own constraints hold torch where it is; everything else comes from the requirements.
RUN python -m pip install --no-cache-dir -e '.[data,eval,plot,gguf]'
CMD ["megatron-let"]
