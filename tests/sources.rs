//! Reading from registries and S3: real servers for what is right, scripted ones for what goes wrong.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use clip_csi::source::policy::{RegistryEntry, S3Entry, SourceConfig};
use clip_csi::source::{BlobSource, Credentials, ImageRef, Location, Scope, SourceError, Sources};
use clip_csi::units::{Digest, Platform};
use common::http_fault::{Reply, Seen, Server};
use common::image::TestImage;
use common::registry::{PASSWORD, Registry, USER};
use common::s3::S3;
use common::skip::{self, needs};
use common::{login, node_sources, noise, sources};
use futures::StreamExt;

fn amd64() -> Platform {
    "linux/amd64".parse().unwrap()
}

fn image(text: &str) -> ImageRef {
    text.parse().unwrap()
}

fn blob(host: &str, digest: Digest) -> Location {
    Location::Registry { registry: host.into(), repository: "team/app".into(), digest }
}

async fn collect(source: &dyn BlobSource, offset: u64) -> Result<Vec<u8>, SourceError> {
    let mut stream = source.stream(offset).await?;
    let mut all = Vec::new();
    while let Some(piece) = stream.next().await {
        all.extend_from_slice(&piece?);
    }
    Ok(all)
}

/// What a good registry answers for this image.
fn registry_answer(seen: &Seen, image: &TestImage) -> Reply {
    let path = seen.path.split('?').next().unwrap_or_default();
    let last = path.rsplit('/').next().unwrap_or_default();
    if path.contains("/manifests/") {
        return match last == "v1" || last == image.digest().to_string() {
            true => Reply::ok(image.manifest.clone()).with("docker-content-digest", &image.digest().to_string()),
            false => Reply::status(404),
        };
    }
    match image.blobs().find(|b| Digest::of(b).to_string() == last) {
        Some(bytes) => Reply::range(seen, bytes),
        None => Reply::status(404),
    }
}

// Real registries.

#[tokio::test]
async fn an_image_is_resolved_and_read_from_a_real_registry() {
    needs!("docker-registry");
    let registry = Registry::start();
    let data = noise(3 << 20, 1);
    let made = TestImage::new(vec![(common::image::LAYER, data.clone()), (common::image::LAYER, b"second".to_vec())]);
    let digest = registry.push("team/app", "v1", &made).await;
    let sources = node_sources(&[registry.host()]);

    let resolved =
        sources.resolve(&image(&registry.image("team/app", "v1")), &amd64(), &Credentials::default()).await.unwrap();
    assert_eq!((resolved.manifest_digest, resolved.scope), (digest, Scope::Public));
    assert_eq!(resolved.config, made.config);
    assert_eq!(resolved.layers.len(), 2);
    let layer = &resolved.layers[0];
    assert_eq!(layer.source.stat().await.unwrap().size, data.len() as u64);
    assert_eq!(layer.source.read_range(1000..2_000_000).await.unwrap(), data[1000..2_000_000]);
    assert_eq!(layer.source.read_range(3_145_727..3_145_728).await.unwrap(), data[3_145_727..]);
    assert!(layer.source.read_range(3_145_727..3_145_729).await.is_err());
    assert_eq!(collect(&*layer.source, 0).await.unwrap(), data);
    assert_eq!(collect(&*layer.source, 3_000_000).await.unwrap(), data[3_000_000..]);
    assert!(collect(&*layer.source, 3_145_728).await.unwrap().is_empty());

    let by_digest = image(&format!("{}/team/app@{digest}", registry.host()));
    assert_eq!(sources.resolve(&by_digest, &amd64(), &Credentials::default()).await.unwrap().manifest_digest, digest);

    let location = blob(registry.host(), layer.digest);
    let opened = sources.open(&location, &Credentials::default()).await.unwrap();
    let stat = opened.stat().await.unwrap();
    assert_eq!((stat.size, stat.identity), (data.len() as u64, layer.digest.to_string()));
    assert_eq!(sources.scope(&location, &Credentials::default()).await.unwrap(), Scope::Public);

    let missing = sources.open(&blob(registry.host(), Digest::of(b"missing")), &Credentials::default()).await.unwrap();
    assert_eq!(missing.read_range(0..1).await.unwrap_err().kind(), "not_found");
    let absent = image(&registry.image("team/app", "absent"));
    let error = sources.resolve(&absent, &amd64(), &Credentials::default()).await.unwrap_err();
    assert!(error.kind() == "not_found" && error.to_string().contains("team/app:absent"), "{error}");
}

#[tokio::test]
async fn a_login_on_a_public_image_leaves_it_public() {
    needs!("docker-registry");
    let registry = Registry::start();
    registry.push("team/app", "v1", &TestImage::of_layer(noise(100, 1))).await;
    let sources = node_sources(&[registry.host()]);
    let credentials = login(registry.host(), "anybody", "anything", "a");
    let resolved = sources.resolve(&image(&registry.image("team/app", "v1")), &amd64(), &credentials).await.unwrap();
    assert_eq!(resolved.scope, Scope::Public);
}

#[tokio::test]
async fn a_private_registry_wants_the_right_login_each_time() {
    needs!("docker-registry");
    let registry = Registry::start_with_login();
    let made = TestImage::of_layer(noise(1000, 1));
    registry.push("team/app", "v1", &made).await;
    let sources = node_sources(&[registry.host()]);
    let reference = image(&registry.image("team/app", "v1"));
    let digest = Digest::of(&made.layers[0].1);
    let location = blob(registry.host(), digest);

    let right = login(registry.host(), USER, PASSWORD, "secret a");
    let resolved = sources.resolve(&reference, &amd64(), &right).await.unwrap();
    let Scope::Private(scope) = resolved.scope else { panic!("public") };
    assert_eq!(resolved.layers[0].source.read_range(0..1000).await.unwrap(), made.layers[0].1);
    assert_eq!(sources.scope(&location, &right).await.unwrap(), Scope::Private(scope));

    // The scope follows the secret, not its bytes.
    let same_bytes = login(registry.host(), USER, PASSWORD, "secret b");
    let other = sources.resolve(&reference, &amd64(), &same_bytes).await.unwrap().scope;
    assert_ne!(other, Scope::Private(scope));

    // Neither what was fetched nor what was learnt lets anybody else in.
    let wrong = login(registry.host(), USER, "wrong-pw", "secret c");
    let elsewhere = login("elsewhere.example", USER, PASSWORD, "secret d");
    for bad in [&wrong, &elsewhere, &Credentials::default()] {
        let error = sources.resolve(&reference, &amd64(), bad).await.unwrap_err();
        assert_eq!(error.kind(), "denied", "{error}");
        let text = error.to_string();
        assert!(text.contains("pull secret") && !text.contains("wrong-pw") && !text.contains(PASSWORD), "{text}");
        assert_eq!(sources.scope(&location, bad).await.unwrap_err().kind(), "denied");
        let source = sources.open(&location, bad).await.unwrap();
        assert_eq!(source.read_range(0..1).await.unwrap_err().kind(), "denied");
    }
}

#[tokio::test]
async fn configured_credentials_serve_their_registry_only() {
    needs!("docker-registry");
    let registry = Registry::start_with_login();
    registry.push("team/app", "v1", &TestImage::of_layer(noise(100, 1))).await;
    let other = Server::start(|_, _| Reply::status(401).with("www-authenticate", "Basic realm=\"x\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    let json = login(registry.host(), USER, PASSWORD, "x").docker_config.unwrap();
    std::fs::write(&file, json.as_bytes()).unwrap();
    let entry = RegistryEntry { docker_config: Some(file), ..Default::default() };
    let registries = [(registry.host().to_owned(), entry), (other.host().to_owned(), RegistryEntry::default())];
    let sources = sources(false, SourceConfig { registries: registries.into(), ..Default::default() });
    let reference = image(&registry.image("team/app", "v1"));
    let resolved = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap();
    assert!(matches!(resolved.scope, Scope::Private(_)));

    let reference = image(&format!("{}/team/app:v1", other.host()));
    let error = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap_err();
    assert_eq!(error.kind(), "denied");
    assert!(other.seen().iter().all(|seen| seen.header("authorization").is_none()));
}

// Tokens.

/// A registry behind a token service that wants `user:pw`; a token is good for `uses` requests.
async fn token_registry(made: TestImage, uses: usize) -> Server {
    let host = Arc::new(std::sync::OnceLock::<String>::new());
    let (known, issued, used) = (host.clone(), AtomicUsize::new(0), AtomicUsize::new(0));
    let server = Server::start(move |seen, _| {
        if seen.path.starts_with("/token") {
            assert!(seen.path.contains("scope=repository%3Ateam%2Fapp%3Apull") && seen.path.contains("service=svc"));
            return match seen.header("authorization") {
                Some("Basic dXNlcjpwdw==") => {
                    used.store(0, Ordering::SeqCst);
                    let n = issued.fetch_add(1, Ordering::SeqCst) + 1;
                    Reply::ok(format!(r#"{{"token":"token-{n}","expires_in":3600}}"#))
                }
                _ => Reply::status(401),
            };
        }
        let want = format!("Bearer token-{}", issued.load(Ordering::SeqCst));
        if seen.header("authorization") == Some(&want) && used.fetch_add(1, Ordering::SeqCst) < uses {
            return registry_answer(seen, &made);
        }
        let realm = format!("http://{}/token", known.get().map_or("", String::as_str));
        Reply::status(401).with("www-authenticate", &format!("Bearer realm=\"{realm}\",service=\"svc\",scope=\"x\""))
    })
    .await;
    host.set(server.host().to_owned()).unwrap();
    server
}

#[tokio::test]
async fn tokens_are_fetched_once_and_renewed_when_they_end() {
    let data = noise(5000, 2);
    let made = TestImage::of_layer(data.clone());
    let server = token_registry(made, 4).await;
    let sources = node_sources(&[server.host()]);
    let credentials = login(server.host(), "user", "pw", "a");
    let resolved =
        sources.resolve(&image(&format!("{}/team/app:v1", server.host())), &amd64(), &credentials).await.unwrap();
    assert!(matches!(resolved.scope, Scope::Private(_)));
    for i in 0..20 {
        let range = i * 100..i * 100 + 100;
        let got = resolved.layers[0].source.read_range(range.clone()).await.unwrap();
        assert_eq!(got, data[range.start as usize..range.end as usize]);
    }
    // The anonymous try asks for a token too, in vain.
    let tokens =
        server.seen().iter().filter(|s| s.path.starts_with("/token") && s.header("authorization").is_some()).count();
    assert!((5..=7).contains(&tokens), "{tokens} tokens for 22 requests of which each serves 4");
}

#[tokio::test]
async fn requests_that_come_together_share_one_token() {
    let made = TestImage::of_layer(noise(5000, 2));
    let digest = Digest::of(&made.layers[0].1);
    let server = token_registry(made, usize::MAX).await;
    let sources = node_sources(&[server.host()]);
    let source = sources.open(&blob(server.host(), digest), &login(server.host(), "user", "pw", "a")).await.unwrap();
    let reads = futures::future::join_all((0..16).map(|i| source.read_range(i..i + 1))).await;
    assert!(reads.iter().all(Result::is_ok));
    assert_eq!(server.seen().iter().filter(|s| s.path.starts_with("/token")).count(), 1);
}

#[tokio::test]
async fn a_login_that_the_token_service_refuses_is_denied_without_telling_it() {
    let server = token_registry(TestImage::of_layer(noise(10, 2)), 100).await;
    let sources = node_sources(&[server.host()]);
    let reference = image(&format!("{}/team/app:v1", server.host()));
    let error = sources.resolve(&reference, &amd64(), &login(server.host(), "user", "bad-pw", "a")).await.unwrap_err();
    assert!(error.kind() == "denied" && error.to_string().contains("pull secret"), "{error}");
    assert!(!format!("{error} {error:?}").contains("bad-pw"));
}

#[tokio::test]
async fn a_login_never_goes_to_a_token_service_on_another_host() {
    let thief = Server::start(|_, _| Reply::ok(r#"{"token":"t"}"#)).await;
    let realm = thief.url("/token").replace("127.0.0.1", "127.0.0.2");
    let server = Server::start(move |_, _| {
        Reply::status(401).with("www-authenticate", &format!("Bearer realm=\"{realm}\",service=\"s\""))
    })
    .await;
    let thief_host = thief.host().replace("127.0.0.1", "127.0.0.2");
    let sources = node_sources(&[server.host(), &thief_host]);
    let credentials = login(server.host(), "user", "pw", "a");
    let reference = image(&format!("{}/team/app:v1", server.host()));
    let error = sources.resolve(&reference, &amd64(), &credentials).await.unwrap_err();
    assert!(error.kind() == "refused" && error.to_string().contains("tokenHosts"), "{error}");
    assert!(thief.seen().is_empty());
}

#[tokio::test]
async fn a_token_service_can_not_be_the_metadata_service() {
    for realm in
        ["http://169.254.169.254/latest/meta-data", "http://localhost:1/", "file:///etc/passwd", "http://[::1]:1/"]
    {
        let server = Server::start(move |_, _| {
            Reply::status(401).with("www-authenticate", &format!("Bearer realm=\"{realm}\",service=\"s\""))
        })
        .await;
        let reference = image(&format!("{}/team/app:v1", server.host()));
        let sources = node_sources(&[server.host()]);
        let error = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap_err();
        assert_eq!(error.kind(), "refused", "{realm}: {error}");
    }
}

// Redirects.

#[tokio::test]
async fn the_registrys_credentials_never_reach_the_storage_behind_it() {
    let made = TestImage::of_layer(noise(100_000, 3));
    let data = made.layers[0].1.clone();
    let (served, whole) = (made.clone(), data.clone());
    let storage = Server::start(move |seen, _| Reply::range(seen, &whole)).await;
    let to = storage.url("/bucket/object?signature=SIGNED");
    let registry = Server::start(move |seen, _| match seen.header("authorization") {
        None => Reply::status(401).with("www-authenticate", "Basic realm=\"x\""),
        Some(_) if seen.path.contains("/blobs/") && seen.range().is_some() => Reply::redirect(&to),
        Some(_) => registry_answer(seen, &served),
    })
    .await;
    let sources = node_sources(&[registry.host(), storage.host()]);
    let credentials = login(registry.host(), "user", "pw", "a");
    let source = sources.open(&blob(registry.host(), Digest::of(&data)), &credentials).await.unwrap();
    assert_eq!(source.read_range(10..20).await.unwrap(), data[10..20]);
    assert_eq!(source.read_range(50_000..99_000).await.unwrap(), data[50_000..99_000]);
    assert!(registry.seen().iter().any(|s| s.header("authorization").is_some()));
    assert_eq!(storage.seen().len(), 2);
    assert!(storage.seen().iter().all(|s| s.header("authorization").is_none()));
    // The second read went to the storage at once: 401, then one redirect, then none.
    assert_eq!(registry.seen().len(), 2);
}

#[tokio::test]
async fn a_signature_that_ended_is_renewed_at_the_registry() {
    let data = Bytes::from(noise(1000, 3));
    let whole = data.clone();
    let storage =
        Server::start(move |seen, _| match seen.path.contains("signature=2") || seen.range() == Some((0, 9)) {
            true => Reply::range(seen, &whole),
            false => Reply::status(403).with("content-type", "application/xml"),
        })
        .await;
    let base = storage.url("/object");
    let registry = Server::start(move |_, before| Reply::redirect(&format!("{base}?signature={}", before + 1))).await;
    let sources = node_sources(&[registry.host(), storage.host()]);
    let source = sources.open(&blob(registry.host(), Digest::of(&data)), &Credentials::default()).await.unwrap();
    assert_eq!(source.read_range(0..10).await.unwrap(), data[..10]);
    assert_eq!(source.read_range(10..20).await.unwrap(), data[10..20]);
    assert_eq!((registry.seen().len(), storage.seen().len()), (2, 3));
}

#[tokio::test]
async fn redirects_lead_volumes_neither_to_metadata_nor_to_the_node() {
    let other = Server::start(|_, _| Reply::ok("secret of the node")).await;
    let port = other.host().rsplit(':').next().unwrap().to_owned();
    for to in [
        "http://169.254.169.254/latest/meta-data/iam".to_owned(),
        "http://[::ffff:169.254.169.254]/".to_owned(),
        "http://2852039166/".to_owned(),
        format!("http://localhost:{port}/"),
        format!("http://127.0.0.1:{port}/"),
        format!("http://[::1]:{port}/"),
        "ftp://example.com/".to_owned(),
        "http://user:pw@example.com/".to_owned(),
    ] {
        let target = to.clone();
        let registry = Server::start(move |_, _| Reply::redirect(&target)).await;
        let sources = node_sources(&[registry.host()]);
        let source = sources.open(&blob(registry.host(), Digest::of(b"x")), &Credentials::default()).await.unwrap();
        let error = source.read_range(0..1).await.unwrap_err();
        assert_eq!(error.kind(), "refused", "{to}: {error}");
        assert!(!error.to_string().contains("user:pw"), "{error}");
        assert_eq!(registry.seen().len(), 1, "a refusal is not tried again");
    }
    assert!(other.seen().is_empty());
}

#[tokio::test]
async fn redirects_end_after_five() {
    let registry = Server::start(|_, _| Reply::redirect("/v2/round/and/round")).await;
    let sources = node_sources(&[registry.host()]);
    let source = sources.open(&blob(registry.host(), Digest::of(b"x")), &Credentials::default()).await.unwrap();
    let error = source.read_range(0..1).await.unwrap_err();
    assert!(error.kind() == "corrupt" && error.to_string().contains("redirects"), "{error}");
    assert_eq!(registry.seen().len(), 6 * 6);
}

// Answers that are wrong.

#[tokio::test]
async fn every_status_becomes_the_error_that_it_means() {
    for (status, kind, requests, says) in [
        (401, "denied", 1, "401"),
        (403, "denied", 1, "pull secret"),
        (404, "not_found", 1, "check the name"),
        (416, "corrupt", 1, "shorter"),
        (418, "unavailable", 1, "418"),
        (429, "unavailable", 6, "(6 tries)"),
        (500, "unavailable", 6, "500"),
        (503, "unavailable", 6, "TOOMANY a message"),
    ] {
        let registry = Server::start(move |_, _| Reply {
            body: r#"{"errors":[{"code":"TOOMANY","message":"a\n message"}]}"#.into(),
            ..Reply::status(status)
        })
        .await;
        let sources = node_sources(&[registry.host()]);
        let source = sources.open(&blob(registry.host(), Digest::of(b"x")), &Credentials::default()).await.unwrap();
        let error = source.read_range(0..1).await.unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == kind && text.contains(says) && !text.contains('\n'), "{status}: {text}");
        assert_eq!(registry.seen().len(), requests, "{status}");
    }
}

#[tokio::test]
async fn a_registry_that_asks_for_patience_gets_it() {
    let data = Bytes::from(noise(100, 4));
    let whole = data.clone();
    let registry = Server::start(move |seen, before| match before {
        0 => Reply::status(429).with("retry-after", "1"),
        1 => Reply::status(503),
        _ => Reply::range(seen, &whole),
    })
    .await;
    let sources = node_sources(&[registry.host()]);
    let source = sources.open(&blob(registry.host(), Digest::of(&data)), &Credentials::default()).await.unwrap();
    let start = std::time::Instant::now();
    assert_eq!(source.read_range(0..100).await.unwrap(), data);
    // The policy of these tests obeys up to 300 ms.
    assert!(start.elapsed() >= std::time::Duration::from_millis(300));
    assert_eq!(registry.seen().len(), 3);
}

#[tokio::test]
async fn short_and_wrong_bodies_are_never_handed_on() {
    let data = Bytes::from(noise(2 << 20, 5));
    type Wrong = fn(&Seen, &Bytes) -> Reply;
    let cases: [(&str, Wrong); 9] = [
        ("the body is cut", |s, d| Reply::range(s, d).cut_after(50)),
        ("the body is cut at once", |s, d| Reply::range(s, d).cut_after(0)),
        ("another range", |s, d| Reply::range(s, d).with("content-range", "bytes 0-99/2097152")),
        ("a shorter range", |s, d| {
            Reply { body: d.slice(1000..1050), ..Reply::range(s, d) }.with("content-range", "bytes 1000-1049/2097152")
        }),
        ("fewer bytes than the range", |s, d| Reply { body: d.slice(1000..1050), ..Reply::range(s, d) }),
        ("more bytes than the range", |s, d| Reply { body: d.slice(1000..1200), ..Reply::range(s, d) }),
        ("no range", |s, d| Reply { headers: Vec::new(), ..Reply::range(s, d) }),
        ("the whole blob", |_, d| Reply::ok(d.clone())),
        ("an encoding", |s, d| Reply::range(s, d).with("content-encoding", "gzip")),
    ];
    for (name, wrong) in cases {
        let whole = data.clone();
        let always = Server::start(move |seen, _| wrong(seen, &whole)).await;
        let whole = data.clone();
        let once = Server::start(move |seen, before| match before {
            0 => wrong(seen, &whole),
            _ => Reply::range(seen, &whole),
        })
        .await;
        let sources = node_sources(&[always.host(), once.host()]);
        let digest = Digest::of(&data);
        let source = sources.open(&blob(always.host(), digest), &Credentials::default()).await.unwrap();
        let error = source.read_range(1000..1100).await.unwrap_err();
        assert!(["corrupt", "unavailable"].contains(&error.kind()), "{name}: {error}");
        assert_eq!(always.seen().len(), 6, "{name}");
        let source = sources.open(&blob(once.host(), digest), &Credentials::default()).await.unwrap();
        assert_eq!(source.read_range(1000..1100).await.unwrap(), data[1000..1100], "{name}");
    }
}

#[tokio::test]
async fn a_small_blob_may_come_whole() {
    let data = Bytes::from(noise(1000, 6));
    let whole = data.clone();
    let registry = Server::start(move |_, _| Reply::ok(whole.clone())).await;
    let sources = node_sources(&[registry.host()]);
    let source = sources.open(&blob(registry.host(), Digest::of(&data)), &Credentials::default()).await.unwrap();
    assert_eq!(source.read_range(100..200).await.unwrap(), data[100..200]);
    assert_eq!(source.stat().await.unwrap().size, 1000);
    assert_eq!(source.read_range(900..1001).await.unwrap_err().kind(), "corrupt");
}

#[tokio::test]
async fn a_stream_goes_on_where_the_connection_broke() {
    let data = Bytes::from(noise(300_000, 7));
    let whole = data.clone();
    let registry = Server::start(move |seen, _| Reply::range(seen, &whole).cut_after(40_000)).await;
    let sources = node_sources(&[registry.host()]);
    let source = sources.open(&blob(registry.host(), Digest::of(&data)), &Credentials::default()).await.unwrap();
    assert_eq!(collect(&*source, 0).await.unwrap(), data);
    let seen = registry.seen();
    assert!(seen.len() >= 8, "{}", seen.len());
    assert!(seen[0].range().is_none() && seen.windows(2).all(|w| w[0].range() < w[1].range()));

    let stuck = Server::start(move |seen, _| Reply::range(seen, &Bytes::from_static(b"0123456789")).cut_after(0)).await;
    let sources = node_sources(&[stuck.host()]);
    let source = sources.open(&blob(stuck.host(), Digest::of(b"x")), &Credentials::default()).await.unwrap();
    assert_eq!(collect(&*source, 0).await.unwrap_err().kind(), "unavailable");
}

#[tokio::test]
async fn manifests_and_configs_that_do_not_match_their_digest_are_refused() {
    let made = TestImage::of_layer(noise(10, 8));
    let forged: Bytes = String::from_utf8_lossy(&made.manifest).replace("amd64", "arm64").replace(": ", ":").into();
    for part in ["/manifests/", "/blobs/"] {
        let (served, forged) = (made.clone(), Bytes::from([&forged[..], b" "].concat()));
        let registry = Server::start(move |seen, _| match seen.path.contains(part) {
            true => Reply::ok(forged.clone()),
            false => registry_answer(seen, &served),
        })
        .await;
        let sources = node_sources(&[registry.host()]);
        let reference = image(&format!("{}/team/app@{}", registry.host(), made.digest()));
        let error = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap_err();
        assert_eq!(error.kind(), "corrupt", "{part}: {error}");
    }
}

#[tokio::test]
async fn manifests_without_end_are_refused() {
    let registry = Server::start(|_, _| Reply::ok(vec![b' '; (4 << 20) + 1])).await;
    let sources = node_sources(&[registry.host()]);
    let reference = image(&format!("{}/team/app:v1", registry.host()));
    let error = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap_err();
    assert!(error.kind() == "invalid" && error.to_string().contains("4194304"), "{error}");
}

#[tokio::test]
async fn a_layer_of_another_size_than_its_manifest_says_is_refused() {
    let made = TestImage::of_layer(noise(1000, 9));
    let served = made.clone();
    let grown = Bytes::from(noise(2000, 9));
    let layer = Digest::of(&made.layers[0].1).to_string();
    let registry = Server::start(move |seen, _| match seen.path.ends_with(&layer) {
        true => Reply::range(seen, &grown),
        false => registry_answer(seen, &served),
    })
    .await;
    let sources = node_sources(&[registry.host()]);
    let reference = image(&format!("{}/team/app:v1", registry.host()));
    let resolved = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap();
    let source = &resolved.layers[0].source;
    assert_eq!(source.read_range(0..10).await.unwrap_err().kind(), "corrupt");
    assert_eq!(collect(&**source, 0).await.unwrap_err().kind(), "corrupt");
}

#[tokio::test]
async fn a_blob_that_was_cut_short_is_read_once_it_is_whole_again() {
    let data = Bytes::from(noise(2 << 20, 11));
    let (whole, restored) = (data.clone(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let is_restored = restored.clone();
    let registry = Server::start(move |seen, _| {
        let len = if is_restored.load(Ordering::SeqCst) { whole.len() } else { 1 << 20 };
        Reply::range(seen, &whole.slice(..len))
    })
    .await;
    let sources = node_sources(&[registry.host()]);
    let source = sources.open(&blob(registry.host(), Digest::of(&data)), &Credentials::default()).await.unwrap();
    assert_eq!(source.read_range(0..100).await.unwrap(), data[..100]);
    let end = data.len() as u64;
    assert_eq!(source.read_range(end - 100..end).await.unwrap_err().kind(), "corrupt");
    restored.store(true, Ordering::SeqCst);
    assert_eq!(source.read_range(end - 100..end).await.unwrap(), data[data.len() - 100..]);
    assert_eq!(source.stat().await.unwrap().size, end);
}

#[tokio::test]
async fn nobody_at_home_is_said_with_host_and_tries() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let sources = node_sources(&[&closed]);
    let source = sources.open(&blob(&closed, Digest::of(b"x")), &Credentials::default()).await.unwrap();
    let error = source.read_range(0..1).await.unwrap_err();
    assert!(
        matches!(error, SourceError::Unavailable { tries: 6, .. }) && error.to_string().contains(&closed),
        "{error}"
    );
}

#[tokio::test]
async fn a_registry_that_speaks_no_tls_is_recognised() {
    let registry = Server::start(|_, _| Reply::status(200)).await;
    let location = Location::Registry {
        registry: format!("https://{}", registry.host()),
        repository: "a".into(),
        digest: Digest::of(b"x"),
    };
    let source = node_sources(&[registry.host()]).open(&location, &Credentials::default()).await.unwrap();
    let error = source.read_range(0..1).await.unwrap_err().to_string();
    assert!(error.contains("plainHttp"), "{error}");
}

#[tokio::test]
async fn a_registry_of_an_own_authority_is_read_with_its_ca_file_and_refused_without() {
    needs!("docker-registry", "openssl");
    let registry = Registry::start_with_tls();
    let made = TestImage::of_layer(noise(1000, 18));
    let digest = registry.push("team/app", "v1", &made).await;
    let location = blob(&format!("https://{}", registry.host()), Digest::of(&made.layers[0].1));
    let with = |ca_file| {
        let entry = RegistryEntry { ca_file, ..Default::default() };
        sources(false, SourceConfig { registries: [(registry.host().to_owned(), entry)].into(), ..Default::default() })
    };
    let read =
        async |sources: &Sources| sources.open(&location, &Credentials::default()).await?.read_range(10..20).await;

    let error = read(&with(None)).await.unwrap_err().to_string();
    assert!(error.contains(registry.host()) && error.contains("caFile") && error.contains("(1 tries)"), "{error}");

    let sources = with(Some(registry.ca_file()));
    assert_eq!(read(&sources).await.unwrap(), made.layers[0].1[10..20]);
    let reference = image(&registry.image("team/app", "v1"));
    let resolved = sources.resolve(&reference, &amd64(), &Credentials::default()).await.unwrap();
    assert_eq!((resolved.manifest_digest, resolved.scope), (digest, Scope::Public));
}

#[tokio::test]
async fn mirrors_are_asked_first_and_the_origin_when_they_fail() {
    let data = Bytes::from(noise(1000, 10));
    let (whole, again) = (data.clone(), data.clone());
    let good = Server::start(move |seen, _| Reply::range(seen, &whole)).await;
    let origin = Server::start(move |seen, _| Reply::range(seen, &again)).await;
    let empty = Server::start(|_, _| Reply::status(404)).await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let with = |mirrors: &[&str]| {
        let mirrors = mirrors.iter().map(|m| (*m).to_owned()).collect();
        let entry = RegistryEntry { plain_http: true, mirrors, ..Default::default() };
        sources(false, SourceConfig { registries: [(origin.host().to_owned(), entry)].into(), ..Default::default() })
    };
    let location = blob(origin.host(), Digest::of(&data));
    let credentials = login(origin.host(), "user", "pw", "a");
    let first = with(&[good.host()]).open(&location, &credentials).await.unwrap();
    assert_eq!(first.read_range(0..10).await.unwrap(), data[..10]);
    assert!(origin.seen().is_empty());
    let seen = &good.seen()[0];
    assert!(seen.header("authorization").is_none() && seen.path.contains("ns="), "{seen:?}");

    let second = with(&[&closed, empty.host()]).open(&location, &Credentials::default()).await.unwrap();
    assert_eq!(second.read_range(0..10).await.unwrap(), data[..10]);
    assert_eq!((origin.seen().len(), empty.seen().len()), (1, 1));
}

/// A pull secret may hold the mirror's login alone.
#[tokio::test]
async fn what_only_a_login_at_the_mirror_opens_is_private() {
    needs!("docker-registry");
    let (origin, mirror) = (Registry::start_with_login(), Registry::start_with_login());
    let made = TestImage::of_layer(noise(1000, 19));
    mirror.push("team/app", "v1", &made).await;
    let entry = |mirrors: Vec<String>| RegistryEntry { plain_http: true, mirrors, ..Default::default() };
    let registries =
        [(origin.host().to_owned(), entry(vec![mirror.host().to_owned()])), (mirror.host().to_owned(), entry(vec![]))];
    let sources = sources(false, SourceConfig { registries: registries.into(), ..Default::default() });
    let reference = image(&origin.image("team/app", "v1"));
    let secret = login(mirror.host(), USER, PASSWORD, "a");

    let stranger = Credentials::default();
    assert_eq!(sources.resolve(&reference, &amd64(), &stranger).await.unwrap_err().kind(), "denied");
    let resolved = sources.resolve(&reference, &amd64(), &secret).await.unwrap();
    assert!(matches!(resolved.scope, Scope::Private(_)), "{:?}", resolved.scope);
    let location = blob(origin.host(), Digest::of(&made.layers[0].1));
    assert_eq!(sources.scope(&location, &secret).await.unwrap(), resolved.scope);
    assert_eq!(sources.scope(&location, &stranger).await.unwrap_err().kind(), "denied");
}

#[tokio::test]
async fn unconfigured_loopback_registries_are_for_the_shell() {
    let data = Bytes::from_static(b"0123456789");
    let whole = data.clone();
    let registry = Server::start(move |seen, _| Reply::range(seen, &whole)).await;
    let location = blob(registry.host(), Digest::of(&data));
    let shell = sources(true, SourceConfig::default());
    let source = shell.open(&location, &Credentials::default()).await.unwrap();
    assert_eq!(source.read_range(0..10).await.unwrap(), data);
    let node = sources(false, SourceConfig::default());
    assert_eq!(node.open(&location, &Credentials::default()).await.unwrap_err().kind(), "refused");
    assert!(node.trusted().open(&location, &Credentials::default()).await.is_ok());
}

#[test]
fn a_test_without_its_program_is_skipped_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let skips = dir.path().join("skips");
    let test = "a_login_on_a_public_image_leaves_it_public";
    let mut run = std::process::Command::new(std::env::current_exe().unwrap());
    run.args(["--exact", test]).env("PATH", dir.path()).env("CLIP_TEST_SKIPS", &skips);
    let output = run.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let line = format!("SKIPPED: sources::{test}: docker-registry is not installed\n");
    assert_eq!(std::fs::read_to_string(skips).unwrap(), line);
    assert!(String::from_utf8_lossy(&output.stderr).contains(&line));
}

// S3.

/// What the metadata service of an instance is asked while the command looks at an archive.
async fn asked_of_the_instance(archive: &str, variables: &[(&str, &str)]) -> (std::process::Output, Vec<String>) {
    let instance = Server::start(|seen, _| match seen.path.as_str() {
        "/latest/api/token" => Reply::ok("token").with("x-aws-ec2-metadata-token-ttl-seconds", "21600"),
        "/latest/meta-data/placement/region" => Reply::ok("eu-north-1"),
        _ => Reply::status(404),
    })
    .await;
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_clip-csi"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"AWS_")) {
        command.env_remove(name);
    }
    command.env("HOME", "/nonexistent").env("AWS_EC2_METADATA_SERVICE_ENDPOINT", instance.url("/"));
    let output = command.args(["inspect", archive]).envs(variables.iter().copied()).output().await.unwrap();
    (output, instance.seen().into_iter().map(|seen| seen.path).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_asked_for_what_nobody_else_says_and_for_nothing_more() {
    let s3 = S3::start().await;
    s3.bucket("archives");
    let (endpoint, keys) = (s3.endpoint(), s3.keys());
    let with_keys = [("AWS_ACCESS_KEY_ID", &*keys.access_key), ("AWS_SECRET_ACCESS_KEY", &*keys.secret_key)];
    let at_endpoint = format!("s3://archives/absent?endpoint={endpoint}&path-style=true");
    let by_variable = [with_keys[0], with_keys[1], ("AWS_ENDPOINT_URL", endpoint)];
    for (archive, variables) in
        [(&*at_endpoint, &with_keys[..]), ("s3://archives/absent?path-style=true", &by_variable[..])]
    {
        let before = s3.requests().len();
        let (output, asked) = asked_of_the_instance(archive, variables).await;
        assert_eq!(output.status.code(), Some(4), "{archive}: {output:?}");
        assert!(s3.requests().len() > before, "{archive}");
        assert_eq!(asked, Vec::<String>::new(), "{archive}");
    }

    // Without keys it is asked for them; for a region only where none is named. AWS itself is never reached.
    let place = "/latest/meta-data/placement/region";
    for (archive, region_wanted) in [("s3://archives/a?region=eu-west-1", false), ("s3://archives/a", true)] {
        let (output, asked) = asked_of_the_instance(archive, &[]).await;
        assert_eq!(output.status.code(), Some(5), "{archive}: {output:?}");
        assert!(asked.iter().any(|path| path.contains("security-credentials")), "{archive}: {asked:?}");
        assert_eq!(asked.iter().any(|path| path == place), region_wanted, "{archive}: {asked:?}");
    }
}

fn shell() -> Sources {
    sources(true, SourceConfig::default())
}

#[tokio::test]
async fn an_object_is_read_with_getobject_alone() {
    let s3 = S3::start().await;
    let data = noise(300_000, 11);
    s3.put("archives", "a/b c+d%.clip", &data);
    let sources = shell();
    let source = sources.open(&s3.location("archives", "a/b c+d%.clip"), &s3.credentials()).await.unwrap();
    assert_eq!(source.read_range(100..200).await.unwrap(), data[100..200]);
    let stat = source.stat().await.unwrap();
    assert!(stat.size == 300_000 && stat.identity.starts_with("etag="), "{stat:?}");
    assert_eq!(source.read_range(0..300_000).await.unwrap(), data);
    assert_eq!(collect(&*source, 0).await.unwrap(), data);
    assert_eq!(collect(&*source, 299_990).await.unwrap(), data[299_990..]);
    assert_eq!(source.read_range(299_999..300_001).await.unwrap_err().kind(), "corrupt");
    let requests = s3.requests();
    assert_eq!(requests.len(), 4, "{requests:?}");
    assert!(requests.iter().all(|r| r.starts_with("GET /archives/a/b")), "{requests:?}");

    s3.put("archives", "empty", b"");
    let empty = sources.open(&s3.location("archives", "empty"), &s3.credentials()).await.unwrap();
    assert_eq!(empty.stat().await.unwrap().size, 0);
    assert!(collect(&*empty, 0).await.unwrap().is_empty());
    let absent = sources.open(&s3.location("archives", "absent"), &s3.credentials()).await.unwrap();
    let error = absent.read_range(0..1).await.unwrap_err();
    assert!(error.kind() == "not_found" && error.to_string().contains("s3://archives/absent"), "{error}");
    assert_eq!(absent.stat().await.unwrap_err().kind(), "not_found");
}

#[tokio::test]
async fn an_object_that_changes_under_the_reader_is_an_error() {
    let s3 = S3::start().await;
    s3.put("archives", "a", &noise(1000, 12));
    let source = shell().open(&s3.location("archives", "a"), &s3.credentials()).await.unwrap();
    source.read_range(0..10).await.unwrap();
    s3.put("archives", "a", &noise(1000, 13));
    let error = source.read_range(0..10).await.unwrap_err();
    assert!(error.kind() == "corrupt" && error.to_string().contains("changed"), "{error}");
}

#[tokio::test]
async fn archives_are_put_listed_and_deleted() {
    let s3 = S3::start().await;
    s3.bucket("store");
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (dir.path().join("small"), dir.path().join("large"));
    std::fs::write(&small, noise(1000, 14)).unwrap();
    let big = noise((33 << 20) + 17, 15);
    std::fs::write(&large, &big).unwrap();
    let (sources, credentials) = (shell(), s3.credentials());
    let done = AtomicUsize::new(0);
    let progress = |n: u64| {
        done.fetch_add(n as usize, Ordering::SeqCst);
    };
    let at = |key: &str| s3.location("store", key);
    sources.put(&at("x/small"), &small, true, &credentials, &progress).await.unwrap();
    sources.put(&at("x/large"), &large, true, &credentials, &progress).await.unwrap();
    assert_eq!(done.load(Ordering::SeqCst), 1000 + big.len());
    assert_eq!(std::fs::read(s3.path("store", "x/large")).unwrap(), big);
    for (key, file) in [("x/small", &small), ("x/large", &large)] {
        let again = sources.put(&at(key), file, true, &credentials, &|_| {}).await;
        assert!(matches!(again, Err(SourceError::Exists { .. })), "{again:?}");
    }
    sources.put(&at("x/small"), &large, false, &credentials, &|_| {}).await.unwrap();
    assert_eq!(std::fs::read(s3.path("store", "x/small")).unwrap().len(), big.len());
    let listed = sources.list(&at("x/"), &credentials).await.unwrap();
    assert_eq!(listed, [at("x/large"), at("x/small")]);
    sources.delete(&at("x/large"), &credentials).await.unwrap();
    sources.delete(&at("x/large"), &credentials).await.unwrap();
    assert_eq!(sources.list(&at("x/"), &credentials).await.unwrap(), [at("x/small")]);
}

#[tokio::test]
async fn a_failed_upload_leaves_no_parts_behind() {
    let store = Server::start(|seen, _| match (seen.method.as_str(), seen.path.contains("uploads")) {
        ("POST", true) => Reply::ok(
            "<?xml version=\"1.0\"?><InitiateMultipartUploadResult><Bucket>store</Bucket><Key>k</Key><UploadId>ID</UploadId></InitiateMultipartUploadResult>",
        ),
        ("PUT", _) => Reply::status(403),
        ("DELETE", _) => Reply::status(204),
        _ => Reply::status(500),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("large");
    std::fs::write(&file, vec![1; 17 << 20]).unwrap();
    let error = shell().put(&s3_at(&store), &file, false, &some_keys(), &|_| {}).await.unwrap_err();
    assert_eq!(error.kind(), "denied");
    let seen = store.seen();
    assert!(seen.iter().any(|s| s.method == "DELETE" && s.path.contains("uploadId=ID")));
    let part = seen.iter().find(|s| s.method == "PUT").unwrap();
    assert!(
        part.header("x-amz-checksum-sha256").is_some() && part.header("x-amz-content-sha256").is_some(),
        "{part:?}"
    );
}

/// An upload of three parts of which the store has the first; `theirs`: what it says of that part's content.
async fn half_uploaded(whole: &[u8], theirs: &[u8], initiated: &'static str) -> Server {
    let sum = |bytes: &[u8]| {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(Digest::of(bytes).0)
    };
    let (first, there) = (sum(theirs), 16 << 20);
    assert!(whole.len() > 2 * there);
    Server::start(move |seen, _| {
        let xml = |body: String| Reply::ok(format!("<?xml version=\"1.0\"?>{body}"));
        match (seen.method.as_str(), seen.path.as_str()) {
            ("GET", path) if path.contains("uploadId=OLD") => xml(format!(
                "<ListPartsResult><UploadId>OLD</UploadId><IsTruncated>false</IsTruncated><Part><PartNumber>1</PartNumber>\
                 <ETag>&quot;e1&quot;</ETag><Size>{there}</Size><ChecksumSHA256>{first}</ChecksumSHA256></Part></ListPartsResult>"
            )),
            ("GET", path) if path.contains("uploads") => xml(format!(
                "<ListMultipartUploadsResult><IsTruncated>false</IsTruncated><Upload><Key>k</Key><UploadId>OLD</UploadId>\
                 <Initiated>{initiated}</Initiated></Upload><Upload><Key>k-other</Key><UploadId>OTHER</UploadId></Upload>\
                 </ListMultipartUploadsResult>"
            )),
            ("POST", path) if path.contains("uploads") => xml(
                "<InitiateMultipartUploadResult><Bucket>store</Bucket><Key>k</Key><UploadId>NEW</UploadId></InitiateMultipartUploadResult>".into(),
            ),
            ("PUT", _) => {
                Reply::status(200).with("etag", "\"e\"").with("x-amz-checksum-sha256", &sum(&seen.body))
            }
            ("POST", _) => xml("<CompleteMultipartUploadResult><Key>k</Key><ETag>&quot;x&quot;</ETag></CompleteMultipartUploadResult>".into()),
            ("DELETE", _) => Reply::status(204),
            _ => Reply::status(404),
        }
    })
    .await
}

#[tokio::test]
async fn an_interrupted_upload_goes_on_with_the_parts_that_are_ours_and_with_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let (file, whole) = (dir.path().join("large"), noise((33 << 20) + 9, 21));
    std::fs::write(&file, &whole).unwrap();
    let ours = &whole[..16 << 20];
    for (theirs, initiated, id, parts, aborted) in [
        (ours, "2020-01-01T00:00:00.000Z", "uploadId=OLD", 2, false),
        (&whole[1..], "2020-01-01T00:00:00.000Z", "uploadId=NEW", 3, true),
        // Somebody may be at it.
        (&whole[1..], "2999-01-01T00:00:00.000Z", "uploadId=NEW", 3, false),
    ] {
        let store = half_uploaded(&whole, theirs, initiated).await;
        let done = AtomicUsize::new(0);
        let count = |n: u64| {
            done.fetch_add(n as usize, Ordering::SeqCst);
        };
        shell().put(&s3_at(&store), &file, true, &some_keys(), &count).await.unwrap();
        assert_eq!(done.load(Ordering::SeqCst), whole.len());
        let seen = store.seen();
        let sent: Vec<_> = seen.iter().filter(|s| s.method == "PUT").collect();
        assert_eq!(sent.len(), parts);
        assert!(sent.iter().all(|s| s.path.contains(id) && s.header("x-amz-checksum-sha256").is_some()), "{sent:?}");
        let end = seen.iter().find(|s| s.method == "POST" && s.path.contains(id)).unwrap();
        let said = String::from_utf8_lossy(&end.body).into_owned();
        assert_eq!(said.matches("<ChecksumSHA256>").count(), 3, "{said}");
        assert_eq!(end.header("if-none-match"), Some("*"));
        let removed: Vec<_> = seen.iter().filter(|s| s.method == "DELETE").map(|s| &s.path).collect();
        assert_eq!(removed.iter().any(|path| path.contains("uploadId=OLD")), aborted, "{removed:?}");
        assert_eq!(removed.len(), usize::from(aborted));
    }
}

#[tokio::test]
async fn parts_stay_for_the_next_try_where_the_store_can_not_be_reached() {
    let store = Server::start(|seen, _| match (seen.method.as_str(), seen.path.contains("uploads")) {
        ("POST", true) => Reply::ok(
            "<?xml version=\"1.0\"?><InitiateMultipartUploadResult><Bucket>store</Bucket><Key>k</Key><UploadId>ID</UploadId></InitiateMultipartUploadResult>",
        ),
        ("PUT", _) => Reply::status(503),
        _ => Reply::status(404),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("large");
    std::fs::write(&file, vec![1; 17 << 20]).unwrap();
    let error = shell().put(&s3_at(&store), &file, false, &some_keys(), &|_| {}).await.unwrap_err();
    assert_eq!(error.kind(), "unavailable");
    assert!(store.seen().iter().all(|s| s.method != "DELETE"));
}

#[tokio::test]
async fn create_only_is_said_to_the_store_and_its_answer_believed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("small");
    std::fs::write(&file, b"x").unwrap();
    for (status, requests, kind) in [(412, 1, "exists already"), (409, 6, "exists already"), (501, 1, "If-None-Match")]
    {
        let store = Server::start(move |_, _| Reply::status(status)).await;
        let error = shell().put(&s3_at(&store), &file, true, &some_keys(), &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains(kind), "{status}: {error}");
        // It is looked at once more only where an earlier try may have put it there.
        let (puts, looks): (Vec<_>, Vec<_>) = store.seen().into_iter().partition(|s| s.method == "PUT");
        assert_eq!((puts.len(), looks.len()), (requests, usize::from(requests > 1)), "{status}");
        assert!(puts.iter().all(|s| s.header("if-none-match") == Some("*")));
    }
}

fn s3_at(store: &Server) -> Location {
    Location::S3 {
        endpoint: store.url(""),
        region: "eu-west-1".into(),
        bucket: "store".into(),
        key: "k".into(),
        path_style: true,
    }
}

fn some_keys() -> Credentials {
    let keys = clip_csi::source::S3Keys {
        access_key: "AKIA".into(),
        secret_key: "TOPSECRET".into(),
        session_token: Some("SESSION".into()),
    };
    Credentials { s3: Some(Arc::new(keys)), ..Default::default() }
}

#[tokio::test]
async fn every_answer_of_s3_becomes_the_error_that_it_means() {
    let xml =
        |code: &str| format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>said\nso</Message></Error>");
    for (status, code, kind, requests, says) in [
        (403, "AccessDenied", "denied", 1, "s3:GetObject"),
        (403, "InvalidAccessKeyId", "denied", 1, "InvalidAccessKeyId"),
        (400, "ExpiredToken", "denied", 1, "renew"),
        (404, "NoSuchKey", "not_found", 1, "NoSuchKey"),
        (404, "NoSuchBucket", "not_found", 1, "NoSuchBucket"),
        (301, "PermanentRedirect", "invalid", 1, "region"),
        (416, "InvalidRange", "corrupt", 1, "shorter"),
        (412, "PreconditionFailed", "corrupt", 1, "changed"),
        (429, "TooManyRequests", "unavailable", 6, "(6 tries)"),
        (500, "InternalError", "unavailable", 6, "500"),
        (503, "SlowDown", "unavailable", 6, "SlowDown"),
    ] {
        let body = xml(code);
        let store = Server::start(move |_, _| {
            Reply { body: body.clone().into(), ..Reply::status(status) }.with("content-type", "application/xml")
        })
        .await;
        let source = shell().open(&s3_at(&store), &some_keys()).await.unwrap();
        let error = source.read_range(0..1).await.unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == kind && text.contains(says) && !text.contains('\n'), "{status} {code}: {text}");
        assert!(!text.contains("TOPSECRET") && !text.contains("SESSION"), "{text}");
        assert_eq!(store.seen().len(), requests, "{status} {code}");
    }
}

#[tokio::test]
async fn short_and_wrong_bodies_of_s3_are_never_handed_on() {
    let data = Bytes::from(noise(5000, 16));
    type Wrong = fn(&Seen, &Bytes) -> Reply;
    let cases: [(&str, Wrong); 5] = [
        ("the body is cut", |s, d| Reply::range(s, d).cut_after(50)),
        ("another range", |s, d| Reply::range(s, d).with("content-range", "bytes 0-99/5000")),
        ("fewer bytes", |s, d| Reply { body: d.slice(1000..1050), ..Reply::range(s, d) }),
        ("more bytes", |s, d| Reply { body: d.slice(1000..1200), ..Reply::range(s, d) }),
        ("the whole object", |_, d| Reply::ok(d.clone())),
    ];
    for (name, wrong) in cases {
        for faults in [1, usize::MAX] {
            let whole = data.clone();
            let store = Server::start(move |seen, before| match before < faults {
                true => wrong(seen, &whole).with("etag", "\"e\""),
                false => Reply::range(seen, &whole).with("etag", "\"e\""),
            })
            .await;
            let source = shell().open(&s3_at(&store), &some_keys()).await.unwrap();
            let read = source.read_range(1000..1100).await;
            if faults == 1 {
                assert_eq!(read.unwrap(), data[1000..1100], "{name}");
            } else {
                let error = read.unwrap_err();
                assert!(["corrupt", "unavailable"].contains(&error.kind()), "{name}: {error}");
                assert_eq!(store.seen().len(), 6, "{name}");
            }
        }
    }
}

#[tokio::test]
async fn an_s3_stream_goes_on_where_the_connection_broke_and_asks_for_the_same_object() {
    let data = Bytes::from(noise(200_000, 17));
    let whole = data.clone();
    let store = Server::start(move |seen, _| Reply::range(seen, &whole).with("etag", "\"e\"").cut_after(30_000)).await;
    let source = shell().open(&s3_at(&store), &some_keys()).await.unwrap();
    assert_eq!(collect(&*source, 0).await.unwrap(), data);
    assert!(store.seen()[1..].iter().all(|s| s.header("if-match") == Some("\"e\"")));
}

#[tokio::test]
async fn volumes_reach_s3_with_their_own_keys_or_in_configured_places() {
    let s3 = S3::start().await;
    s3.put("archives", "public/a", b"0123456789");
    let location = s3.location("archives", "public/a");
    // The endpoint is on a loopback address: without configuration no volume gets there, whatever keys it has.
    let node = sources(false, SourceConfig::default());
    let source = node.open(&location, &s3.credentials()).await.unwrap();
    assert_eq!(source.read_range(0..1).await.unwrap_err().kind(), "refused");
    assert_eq!(node.open(&location, &Credentials::default()).await.unwrap_err().kind(), "refused");
    assert!(s3.requests().is_empty());

    let entry = S3Entry { endpoint: s3.endpoint().into(), bucket: "other".into(), ..Default::default() };
    let node = sources(false, SourceConfig { s3: vec![entry], ..Default::default() });
    let source = node.open(&location, &s3.credentials()).await.unwrap();
    assert_eq!(source.read_range(0..10).await.unwrap(), "0123456789");
    assert_eq!(node.open(&location, &Credentials::default()).await.unwrap_err().kind(), "refused");
    let (a, b) = (s3.credentials(), some_keys());
    assert_ne!(node.scope(&location, &a).await.unwrap(), node.scope(&location, &b).await.unwrap());

    // Wrong keys are refused by the store, and the keys don't show.
    let source = node.open(&location, &some_keys()).await.unwrap();
    let error = source.read_range(0..1).await.unwrap_err();
    assert!(error.kind() == "denied" && !format!("{error:?}").contains("TOPSECRET"), "{error}");
}
