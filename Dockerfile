# syntax=docker/dockerfile:1
# The image that `make image` makes without a Docker engine: one static binary and the CA roots.
#   docker buildx build --platform linux/amd64,linux/arm64 -t registry.example.com/clip-csi:0.1.0 --push .
# The compiler runs on the machine's own architecture and compiles for the target's.
ARG RUST_IMAGE=docker.io/library/rust:1.94-bookworm

FROM --platform=$BUILDPLATFORM ${RUST_IMAGE} AS build
ARG TARGETARCH=amd64
RUN set -eu; \
    case "$TARGETARCH" in \
      amd64) gnu=x86_64; debian=x86-64 ;; \
      arm64) gnu=aarch64; debian=aarch64 ;; \
      *) echo "TARGETARCH is $TARGETARCH; amd64 and arm64 can be built" >&2; exit 1 ;; \
    esac; \
    if ! command -v "$gnu-linux-gnu-gcc" >/dev/null; then \
      apt-get update -qq; \
      apt-get install -y -qq --no-install-recommends "gcc-$debian-linux-gnu" "libc6-dev-$TARGETARCH-cross" ca-certificates; \
    fi; \
    if command -v rustup >/dev/null; then rustup target add "$gnu-unknown-linux-gnu"; fi
WORKDIR /src
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY src src
COPY benches benches
# A static binary with glibc's own resolver; proc macros and build scripts stay dynamic, since the target is named.
RUN set -eu; \
    case "$TARGETARCH" in amd64) gnu=x86_64 ;; arm64) gnu=aarch64 ;; esac; \
    target=$gnu-unknown-linux-gnu; name=$(echo "$target" | tr a-z- A-Z_); \
    export "CARGO_TARGET_${name}_LINKER=$gnu-linux-gnu-gcc" "CARGO_TARGET_${name}_RUSTFLAGS=-C target-feature=+crt-static" \
      "CC_$(echo "$target" | tr - _)=$gnu-linux-gnu-gcc"; \
    cargo build --release --locked --bin clip-csi --target "$target"; \
    root=/rootfs; \
    mkdir -p $root/etc/ssl/certs $root/etc/clip-csi $root/usr/bin $root/var/lib/clip-csi $root/tmp; \
    chmod 1777 $root/tmp; \
    cp "target/$target/release/clip-csi" $root/usr/bin/; \
    cp /etc/ssl/certs/ca-certificates.crt $root/etc/ssl/certs/; \
    printf 'root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/:/sbin/nologin\n' > $root/etc/passwd; \
    printf 'root:x:0:\nnonroot:x:65532:\n' > $root/etc/group; \
    printf 'passwd: files\ngroup: files\nhosts: files dns\nservices: files\n' > $root/etc/nsswitch.conf

FROM scratch
COPY --from=build /rootfs/ /
ENV PATH=/usr/bin
LABEL org.opencontainers.image.title="clip-csi" \
      org.opencontainers.image.description="Kubernetes CSI driver: container images as volumes, fetched as they are read" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/beam-cloud/clip-csi"
ENTRYPOINT ["/usr/bin/clip-csi"]
