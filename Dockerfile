# Two images built from one checkout (docs/cluster.md):
#
#     docker build --target training -t topk-megatron .             GPUs; NVIDIA's PyTorch image
#     docker build --target analysis -t topk-megatron:analysis .    CPUs; Debian
#
# constraints.txt pins the packages. pip's own variables (PIP_INDEX_URL and others) can be passed as
# build arguments. contrib/run_stage_in_chroot.py runs the analysis stages without Docker.
ARG NGC_PYTORCH=nvcr.io/nvidia/pytorch:26.09-py3
ARG DEBIAN=debian:trixie-slim

# ---- analysis: convert, evaluate, study, explore ------------------------------------------------
FROM ${DEBIAN} AS analysis-build
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/topk_megatron
COPY constraints.txt pyproject.toml ./
COPY docker/requirements.py docker/
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements.py hf evaluate analysis --into /tmp/pip \
    && pip install --requirement /tmp/pip/requirements.txt --constraint /tmp/pip/constraints.txt \
    && rm -r /tmp/pip
COPY setup.py README.md LICENSE ./
COPY topk_megatron/__init__.py topk_megatron/
COPY topk_megatron/ops topk_megatron/ops
ENV TOPK_MEGATRON_BUILD_CPU=force TOPK_MEGATRON_BUILD_CUDA=off
RUN python setup.py --quiet build_ext --inplace

FROM ${DEBIAN} AS analysis
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --no-log-init --create-home --uid 10001 topk \
    && install --directory --owner topk /data /runs
COPY --from=analysis-build /opt/venv /opt/venv
COPY . /opt/topk_megatron
COPY --from=analysis-build /opt/topk_megatron/topk_megatron/ops/_topk_mask_cpu.so \
    /opt/topk_megatron/topk_megatron/ops/
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/topk_megatron PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/topk_megatron
USER 10001
HEALTHCHECK --interval=60s --timeout=30s --start-period=60s \
    CMD ["python", "docker/health.py"]
ENTRYPOINT ["python"]
CMD ["tools/analyze.py", "--help"]

# ---- training: Megatron, both kernels; the base has Transformer Engine and Apex -----------------
FROM ${NGC_PYTORCH} AS training-build
WORKDIR /opt/topk_megatron
COPY setup.py pyproject.toml README.md LICENSE ./
COPY topk_megatron/__init__.py topk_megatron/
COPY topk_megatron/ops topk_megatron/ops
ENV TOPK_MEGATRON_BUILD_CPU=force TOPK_MEGATRON_BUILD_CUDA=force TORCH_CUDA_ARCH_LIST=8.0;9.0;10.0+PTX
RUN python setup.py --quiet build_ext --inplace

FROM ${NGC_PYTORCH} AS training
ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/topk_megatron
COPY constraints.txt pyproject.toml ./
COPY docker/requirements.py docker/
# torch and numpy stay unchanged: the base's other packages are built against them.
RUN --mount=type=cache,target=/root/.cache/pip \
    python docker/requirements.py train hf deepspeed --keep torch numpy --into /tmp/pip \
    && PIP_CONSTRAINT='' pip install --no-build-isolation \
        --requirement /tmp/pip/requirements.txt --constraint /tmp/pip/constraints.txt \
    && rm -r /tmp/pip
RUN useradd --no-log-init --create-home --uid 10001 topk \
    && install --directory --owner topk /data /runs
COPY . .
COPY --from=training-build /opt/topk_megatron/topk_megatron/ops/_topk_mask_cpu.so \
    /opt/topk_megatron/topk_megatron/ops/_topk_mask_cuda.so topk_megatron/ops/
ENV PYTHONPATH=/opt/topk_megatron PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
USER 10001
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s \
    CMD ["python", "docker/health.py"]
# The launcher passes SIGTERM on and waits for the ranks to save: docker stop --time 600.
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/topk_megatron/docker/entrypoint.sh"]
