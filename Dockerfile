# docker build -t semseg . && docker run --rm --gpus all --shm-size=8g semseg mode=doctor
# The wheels of torch bring the CUDA libraries: the host needs a driver and the NVIDIA container toolkit, or no GPU at all.
FROM python:3.11-slim

# What OpenCV's wheel links to and a slim system lacks.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /semseg
COPY pyproject.toml constraints.txt README.md LICENSE run.py ./
COPY configs configs
COPY semseg semseg
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[tb,timm,demo,export]"

# Data and runs are mounted at /semseg/data and /semseg/runs. Several GPUs (NCCL) and the worker of mode=predict use /dev/shm,
# of which a container has 64 MB unless it is started with --shm-size; workers of training and evaluation do not.
ENV SEMSEG_CACHE=/semseg/cache
VOLUME ["/semseg/data", "/semseg/runs", "/semseg/cache"]
EXPOSE 8000
ENTRYPOINT ["python", "run.py"]
CMD ["mode=doctor"]
