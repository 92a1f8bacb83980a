# One image for every pod of a run: head, coordinator, trainers, rollout engines, submitter.
#   docker build -t rlhf-orchestrator:0.1.0-cpu .
#   docker build -t rlhf-orchestrator:0.1.0-gpu --build-arg PROFILE=gpu .
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS builder
# cpu or gpu: which lock file of requirements/ is installed.
ARG PROFILE=cpu
# The lock of the CPU names builds of torch that only PyTorch's own index has.
ARG CPU_WHEELS=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
COPY requirements/ /app/requirements/
RUN CPU_WHEELS=$CPU_WHEELS /app/requirements/packages.sh /opt/venv "/app/requirements/$PROFILE.txt"
COPY . /app
# Editable: paths in a config such as jobs/data/... mean the same files as in a checkout.
RUN /opt/venv/bin/pip install --no-deps --no-build-isolation -e /app \
    && /opt/venv/bin/python -m compileall -q /app
# User 1000 can write no byte code here. Some packages carry templates that are no Python.
RUN /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib > /dev/null || true

FROM python:${PYTHON}
# g++: Triton, torch.compile and DeepSpeed build kernels when they first run. wget, bash: KubeRay's probes and commands.
# libnuma1: vLLM on the CPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash g++ libc6-dev libnuma1 wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 rlhf \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash rlhf \
    && install --directory --owner=rlhf --group=rlhf /runs \
    && echo "export PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/venv.sh
COPY --from=builder /opt/venv /opt/venv
# Owned by root: what runs as user 1000 can't change the program.
COPY --from=builder /app /app
# NVIDIA_VISIBLE_DEVICES stays unset: set here, pods that ask for no GPU would see all GPUs of their node.
# TOKENIZERS_PARALLELISM is no secret.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    TOKENIZERS_PARALLELISM=false
WORKDIR /app
USER 1000:1000
CMD ["python", "-m", "jobs", "run", "--config", "jobs/configs/quickstart.yaml", "run.root=/runs"]
