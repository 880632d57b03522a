# muvit in a container, for machines with or without a GPU:
#   docker build -t muvit .                                  the build of torch with CUDA
#   docker build -t muvit --build-arg TORCH=cpu .            without CUDA, 6 GB smaller
#   docker run --rm --gpus all -v "$PWD:/data" muvit predict model slide.svs --output labels
# On clusters: apptainer build muvit.sif muvit.def
FROM python:3.12-slim

ARG TORCH=
ARG EXTRAS=all

WORKDIR /opt/muvit
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir uv \
 && uv pip install --system --no-cache ${TORCH:+--torch-backend $TORCH} ".[$EXTRAS]"

WORKDIR /data
ENTRYPOINT ["muvit"]
CMD ["--help"]
