use super::*;

#[test]
fn archives_are_named_by_path_or_url() {
    let s3 = |endpoint: &str, region: &str, key: &str, path_style| Location::S3 {
        endpoint: endpoint.into(),
        region: region.into(),
        bucket: "b".into(),
        key: key.into(),
        path_style,
    };
    let digest = Digest::of(b"manifest");
    let artifact = |registry: &str, repository: &str, reference| Location::Artifact {
        registry: registry.into(),
        repository: repository.into(),
        reference,
    };
    for (text, want) in [
        ("a:b/c.clip", Location::File("a:b/c.clip".into())),
        ("file:///a/b%20.clip", Location::File("/a/b%20.clip".into())),
        ("s3://b/k/x.clip", s3("", "", "k/x.clip", false)),
        ("s3://b/k+%25/../x", s3("", "", "k+%/../x", false)),
        ("s3://b/k?endpoint=http%3A%2F%2Fh%3A9000&region=eu&path-style=true", s3("http://h:9000", "eu", "k", true)),
        ("s3://b/k?endpoint=http://h:9000", s3("http://h:9000", "", "k", false)),
        ("s3://b/a&b=c", s3("", "", "a&b=c", false)),
        ("oci://ghcr.io/a/b:t", artifact("ghcr.io", "a/b", ArtifactRef::Tag("t".into()))),
        ("oci://127.0.0.1:5000/a:t", artifact("127.0.0.1:5000", "a", ArtifactRef::Tag("t".into()))),
        (&*format!("oci://ghcr.io/a/b@{digest}"), artifact("ghcr.io", "a/b", ArtifactRef::Digest(digest))),
    ] {
        let parsed = Location::parse_archive(text).unwrap();
        assert_eq!(parsed, want);
        assert_eq!(Location::parse_archive(&parsed.to_string()).unwrap(), want);
    }
    for bad in [
        "",
        "file://relative",
        "http://h/a",
        "s3://",
        "s3:///k",
        "s3://b/k?x=y",
        "s3://b/k?endpoint=h",
        "s3://b/k?path-style=1",
        "oci://",
        "oci://ghcr.io/a/b",
        "oci://a/b:t",
        "oci://ghcr.io/a/b@sha256:00",
        "oci://ghcr.io/A:t",
    ] {
        assert_eq!(Location::parse_archive(bad).unwrap_err().kind(), "invalid", "{bad}");
    }
}

#[test]
fn credentials_never_show_their_secrets() {
    let keys = S3Keys { access_key: "ACCESS".into(), secret_key: "SECRET".into(), session_token: Some("TOKEN".into()) };
    let credentials =
        Credentials { docker_config: Some("DOCKER".into()), s3: Some(Arc::new(keys.clone())), identity: None };
    let shown = format!("{credentials:?} {keys:?}");
    assert!(!["SECRET", "TOKEN", "DOCKER"].iter().any(|s| shown.contains(s)), "{shown}");
}

#[tokio::test]
async fn volumes_reach_no_files_outside_the_roots_and_write_none() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().canonicalize().unwrap();
    let file = base.join("a.clip");
    std::fs::write(&file, "content").unwrap();
    let location = Location::File(file.clone());
    let none = Credentials::default();
    let node = Sources::new(Policy::default()).unwrap();
    assert_eq!(node.open(&location, &none).await.unwrap_err().kind(), "refused");
    assert_eq!(node.put(&location, &file, false, &none, &|_| {}).await.unwrap_err().kind(), "refused");
    assert_eq!(node.delete(&location, &none).await.unwrap_err().kind(), "refused");
    assert_eq!(node.list(&location, &none).await.unwrap_err().kind(), "refused");
    let layout = Location::Layout { dir: base.clone(), digest: Digest::of(b"") };
    assert_eq!(node.open(&layout, &none).await.unwrap_err().kind(), "refused");
    let image: ImageRef = format!("oci:{}", base.display()).parse().unwrap();
    assert_eq!(node.resolve(&image, &Platform::host(), &none).await.unwrap_err().kind(), "refused");
    let image: ImageRef = format!("oci-archive:{}", file.display()).parse().unwrap();
    assert_eq!(node.resolve(&image, &Platform::host(), &none).await.unwrap_err().kind(), "refused");

    assert_eq!(node.trusted().open(&location, &none).await.unwrap().read_range(0..7).await.unwrap(), "content"[..]);
    let config = policy::SourceConfig { archive_roots: vec![base], ..Default::default() };
    let node = Sources::new(Policy { trusted: false, config }).unwrap();
    assert_eq!(node.open(&location, &none).await.unwrap().read_range(0..7).await.unwrap(), "content"[..]);
}
