use super::*;

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layout that is written by hand.
struct Made {
    dir: tempfile::TempDir,
    manifests: Vec<serde_json::Value>,
}

impl Made {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir, manifests: Vec::new() }
    }

    fn blob(&self, bytes: &[u8]) -> serde_json::Value {
        let digest = Digest::of(bytes);
        std::fs::write(self.path(&digest), bytes).unwrap();
        serde_json::json!({"mediaType": GZIP, "digest": digest.to_string(), "size": bytes.len()})
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.hex())
    }

    fn image(&self, arch: &str) -> serde_json::Value {
        let mut config = self.blob(format!(r#"{{"os":"linux","architecture":"{arch}"}}"#).as_bytes());
        config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
        let layer = self.blob(format!("layer of {arch}").as_bytes());
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        let mut descriptor = self.blob(manifest.to_string().as_bytes());
        descriptor["mediaType"] = "application/vnd.oci.image.manifest.v1+json".into();
        descriptor
    }

    fn add(&mut self, mut descriptor: serde_json::Value, tag: Option<&str>) {
        if let Some(tag) = tag {
            descriptor["annotations"] = serde_json::json!({ REF_NAME: tag });
        }
        self.manifests.push(descriptor);
        let index = serde_json::json!({"schemaVersion": 2, "manifests": self.manifests});
        std::fs::write(self.dir.path().join("index.json"), index.to_string()).unwrap();
    }

    async fn resolve(&self, tag: Option<&str>, platform: &str) -> Result<ResolvedImage, SourceError> {
        let reference = ImageRef::Layout { dir: self.dir.path().into(), tag: tag.map(str::to_owned) };
        Layout::dir(self.dir.path(), &Roots::any()).resolve(&reference, tag, &platform.parse().unwrap()).await
    }

    /// The layout as a tar, made by the system's tar in `format`.
    fn tar(&self, format: &str) -> PathBuf {
        let out = self.dir.path().with_extension(format!("{format}.tar"));
        let status = std::process::Command::new("tar")
            .args(["--format", format, "-cf"])
            .arg(&out)
            .arg("-C")
            .arg(self.dir.path())
            .arg(".")
            .status()
            .unwrap();
        assert!(status.success());
        out
    }
}

#[tokio::test]
async fn one_image_needs_no_tag() {
    let mut made = Made::new();
    made.add(made.image("amd64"), Some("only"));
    let image = made.resolve(None, "linux/amd64").await.unwrap();
    assert_eq!(image.platform.to_string(), "linux/amd64");
    assert_eq!(image.scope, Scope::Public);
    assert_eq!(Digest::of(&image.manifest), image.manifest_digest);
    let layer = &image.layers[0];
    assert_eq!((layer.media_type.as_str(), layer.size), (GZIP, 14));
    assert_eq!(layer.source.read_range(0..layer.size).await.unwrap(), "layer of amd64"[..]);
}

#[tokio::test]
async fn an_ambiguous_layout_lists_its_tags() {
    let mut made = Made::new();
    made.add(made.image("amd64"), Some("old"));
    made.add(made.image("arm64"), Some("docker.io/library/x:new"));
    let error = made.resolve(None, "linux/amd64").await.unwrap_err().to_string();
    assert!(error.contains("old") && error.contains("new") && error.contains(":TAG"), "{error}");
    assert_eq!(made.resolve(Some("old"), "linux/amd64").await.unwrap().platform.arch, "amd64");
    assert_eq!(made.resolve(Some("new"), "linux/amd64").await.unwrap().platform.arch, "arm64");
    assert_eq!(made.resolve(Some("none"), "linux/amd64").await.unwrap_err().kind(), "not_found");
}

#[tokio::test]
async fn nested_indexes_are_walked_and_attestations_ignored() {
    let mut made = Made::new();
    let platform = |mut d: serde_json::Value, os: &str, arch: &str| {
        d["platform"] = serde_json::json!({"os": os, "architecture": arch});
        d
    };
    let mut attestation = made.image("amd64-attested");
    attestation["annotations"] = serde_json::json!({"vnd.docker.reference.type": "attestation-manifest"});
    let inner = serde_json::json!({"schemaVersion": 2, "manifests": [
        platform(attestation, "linux", "amd64"),
        platform(made.image("unknown"), "unknown", "unknown"),
        platform(made.image("amd64"), "linux", "amd64"),
        platform(made.image("arm64"), "linux", "arm64"),
    ]});
    let outer = serde_json::json!({"schemaVersion": 2, "manifests": [made.blob(inner.to_string().as_bytes())]});
    made.add(made.blob(outer.to_string().as_bytes()), None);
    assert_eq!(made.resolve(None, "linux/arm64").await.unwrap().platform.arch, "arm64");
    assert_eq!(made.resolve(None, "linux/amd64").await.unwrap().platform.arch, "amd64");
    assert!(made.resolve(None, "linux/riscv64").await.unwrap_err().to_string().contains("linux/arm64"));
}

#[tokio::test]
async fn what_is_no_image_is_refused_by_its_type() {
    let resolve = |config: &'static str, config_type: &'static str, artifact: Option<&'static str>| async move {
        let mut made = Made::new();
        let mut config = made.blob(config.as_bytes());
        config["mediaType"] = config_type.into();
        let mut manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [made.blob(b"chart")]});
        if let Some(artifact) = artifact {
            manifest["artifactType"] = artifact.into();
        }
        made.add(made.blob(manifest.to_string().as_bytes()), None);
        made.resolve(None, "linux/amd64").await
    };
    let helm = "application/vnd.cncf.helm.config.v1+json";
    let sbom = "application/spdx+json";
    for (config_type, artifact, named) in [(helm, None, helm), ("application/vnd.oci.empty.v1+json", Some(sbom), sbom)]
    {
        let error = resolve("{}", config_type, artifact).await.unwrap_err();
        assert_eq!(error.kind(), "invalid");
        assert!(error.to_string().contains(named) && error.to_string().contains("not a container image"), "{error}");
    }
    let odd = resolve(r#"{"os":"linux","rootfs":{"diff_ids":[]}}"#, "application/octet-stream", None).await;
    assert_eq!(odd.unwrap().platform.os, "linux", "an image by its content");
}

#[tokio::test]
async fn an_index_that_holds_itself_ends() {
    // A document can't hold its own digest, but a chain of indexes can be as long as its author likes.
    let mut made = Made::new();
    let mut descriptor = made.image("amd64");
    for _ in 0..10 {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor]});
        descriptor = made.blob(index.to_string().as_bytes());
    }
    made.add(descriptor, None);
    assert!(made.resolve(None, "linux/amd64").await.unwrap_err().to_string().contains("nested"));
}

#[tokio::test]
async fn changed_and_missing_blobs_fail_the_resolve() {
    let mut made = Made::new();
    let descriptor = made.image("amd64");
    let manifest: Digest = descriptor["digest"].as_str().unwrap().parse().unwrap();
    made.add(descriptor, None);
    let image = made.resolve(None, "linux/amd64").await.unwrap();

    std::fs::write(made.path(&image.layers[0].digest), "short").unwrap();
    assert_eq!(made.resolve(None, "linux/amd64").await.unwrap_err().kind(), "corrupt");
    std::fs::remove_file(made.path(&image.layers[0].digest)).unwrap();
    let error = made.resolve(None, "linux/amd64").await.unwrap_err();
    assert!(error.kind() == "not_found" && error.to_string().contains("blob sha256:"), "{error}");

    std::fs::write(made.path(&image.config_digest), r#"{"os":"linux","architecture":"evil"}"#).unwrap();
    assert_eq!(made.resolve(None, "linux/amd64").await.unwrap_err().kind(), "corrupt");
    std::fs::write(made.path(&manifest), "{}").unwrap();
    assert_eq!(made.resolve(None, "linux/amd64").await.unwrap_err().kind(), "corrupt");
}

#[tokio::test]
async fn a_missing_directory_is_not_found_and_one_without_an_index_is_no_layout() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let platform: Platform = "linux/amd64".parse().unwrap();
    for roots in [Roots::any(), Roots::below(&[dir.path().into()])] {
        for (name, kind) in
            [("absent", "not_found"), ("absent/deeper", "not_found"), ("empty", "invalid"), ("file", "invalid")]
        {
            let path = dir.path().join(name);
            let reference = ImageRef::Layout { dir: path.clone(), tag: None };
            let error = Layout::dir(&path, &roots).resolve(&reference, None, &platform).await.unwrap_err();
            assert!(error.kind() == kind && error.to_string().contains(&format!("oci:{}", path.display())), "{error}");
        }
    }
}

#[tokio::test]
async fn an_archived_layout_reads_like_the_directory() {
    let mut made = Made::new();
    made.add(made.image("amd64"), Some("t"));
    let from_dir = made.resolve(None, "linux/amd64").await.unwrap();
    for format in ["gnu", "ustar", "pax"] {
        let file = made.tar(format);
        let layout = Layout::archive(&file, &Roots::any()).await.unwrap();
        let reference = ImageRef::LayoutArchive { file: file.clone(), tag: None };
        let image = layout.resolve(&reference, None, &"linux/amd64".parse().unwrap()).await.unwrap();
        assert_eq!(image.manifest_digest, from_dir.manifest_digest, "{format}");
        let layer = &image.layers[0];
        assert_eq!(layer.source.read_range(0..layer.size).await.unwrap(), "layer of amd64"[..]);
        assert!(layer.source.read_range(0..layer.size + 1).await.is_err());
        std::fs::remove_file(file).unwrap();
    }
}

#[tokio::test]
async fn archives_that_are_no_layout_are_named_for_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let error = async |path: PathBuf| Layout::archive(&path, &Roots::any()).await.unwrap_err().to_string();
    assert!(error(file("a.tgz", &[0x1f, 0x8b, 8, 0])).await.contains("gunzip"));
    assert!(error(file("text", &[b'x'; 600])).await.contains("not a tar"));

    std::fs::create_dir(dir.path().join("saved")).unwrap();
    file("saved/manifest.json", b"[]");
    let out = dir.path().join("saved.tar");
    let mut tar = std::process::Command::new("tar");
    tar.arg("-cf").arg(&out).arg("-C").arg(dir.path().join("saved")).arg(".");
    assert!(tar.status().unwrap().success());
    assert!(error(out.clone()).await.contains("docker save"));

    let mut made = Made::new();
    made.add(made.image("amd64"), None);
    let whole = std::fs::read(made.tar("gnu")).unwrap();
    std::fs::remove_file(made.dir.path().with_extension("gnu.tar")).unwrap();
    let cut = file("cut.tar", &whole[..whole.len().min(1600)]);
    // Cut inside the first file's data: the walk sees that the entry ends after the file.
    match Layout::archive(&cut, &Roots::any()).await {
        Err(error) => assert_eq!(error.kind(), "corrupt"),
        Ok(layout) => assert!(layout.index().await.is_err()),
    }
    assert_eq!(Layout::dir(dir.path(), &Roots::any()).index().await.unwrap_err().kind(), "invalid");
}
