use proptest::prelude::*;

use super::*;

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|&(k, v)| (k.into(), v.into())).collect()
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&t| t.into()).collect()
}

pub(crate) fn oci() -> OciStorage {
    let layers = texts(&["sha256:aa", "sha256:bb"]);
    OciStorage {
        registry_url: "index.docker.io".into(),
        repository: "library/python".into(),
        reference: "3.12@sha256:cc".into(),
        gzip_checkpoints: [("sha256:aa".to_owned(), vec![(0, 0), (100, 5_000_000_000)])].into(),
        zstd_frames: [("sha256:bb".to_owned(), vec![(1, 2, 3, 4), (0, 0, 0, 0)])].into(),
        decompressed_hash: map(&[("sha256:aa", "11"), ("sha256:bb", "22")]),
        image: Some(ImageMetadata {
            name: "docker.io/library/python:3.12".into(),
            digest: "sha256:cc".into(),
            repo_tags: texts(&["a", "b"]),
            created: Some((1_700_000_000, 123_456_789)),
            docker_version: "27".into(),
            labels: map(&[("k", "v"), ("", "")]),
            architecture: "arm64".into(),
            os: "linux".into(),
            variant: "v8".into(),
            author: "somebody".into(),
            env: texts(&["PATH=/bin", ""]),
            cmd: texts(&["python3"]),
            entrypoint: texts(&["/entry", "--"]),
            user: "1000".into(),
            working_dir: "/srv".into(),
            exposed_ports: texts(&["80/tcp", "81/udp"]),
            volumes: texts(&["/data"]),
            stop_signal: "SIGINT".into(),
            layers: layers.clone(),
            layers_data: vec![
                LayerMetadata {
                    mime_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                    digest: "sha256:aa".into(),
                    size: 1 << 40,
                    annotations: map(&[("x", "y")]),
                },
                LayerMetadata::default(),
            ],
        }),
        layers,
    }
}

fn s3() -> S3Storage {
    S3Storage {
        bucket: "b".into(),
        region: "eu-central-1".into(),
        key: "images/x.clip".into(),
        endpoint: "http://127.0.0.1:9000".into(),
        force_path_style: true,
    }
}

#[test]
fn every_kind_round_trips() {
    let empty = OciStorage { image: Some(ImageMetadata::default()), ..OciStorage::default() };
    for storage in [
        Storage::Local,
        Storage::S3(s3()),
        Storage::S3(S3Storage::default()),
        Storage::Oci(Box::new(oci())),
        Storage::Oci(Box::default()),
        Storage::Oci(Box::new(empty)),
    ] {
        let bytes = storage.encode();
        assert_eq!(Storage::decode(&bytes).unwrap(), storage);
        assert_eq!(storage.encode(), bytes);
    }
}

#[test]
fn another_storage_type_is_refused_by_name() {
    let mut bytes = Storage::S3(s3()).encode();
    let at = bytes.windows(3).rposition(|w| w == b"\x02s3").unwrap();
    bytes[at + 1] = b'g';
    let error = Storage::decode(&bytes).unwrap_err();
    assert!(matches!(error, ArchiveError::Unsupported { .. }) && error.to_string().contains("g3"), "{error}");
}

#[test]
fn gos_zero_time_is_no_time() {
    let mut image = oci();
    let created = |image: &mut OciStorage, time| image.image.as_mut().map(|image| image.created = time);
    created(&mut image, Some((-GO_EPOCH, 0)));
    let Storage::Oci(read) = Storage::decode(&Storage::Oci(Box::new(image.clone())).encode()).unwrap() else {
        panic!()
    };
    created(&mut image, None);
    assert_eq!(*read, image);
}

#[test]
fn a_damaged_stream_is_an_error_and_never_a_panic() {
    let bytes = Storage::Oci(Box::new(oci())).encode();
    for len in 1..bytes.len() {
        assert!(Storage::decode(&bytes[..len]).is_err(), "{len}");
    }
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _ = Storage::decode(&bytes);
    }
}

proptest! {
    #[test]
    fn s3_storage_round_trips(texts: [String; 4], force_path_style: bool) {
        let [bucket, region, key, endpoint] = texts;
        let storage = Storage::S3(S3Storage { bucket, region, key, endpoint, force_path_style });
        prop_assert_eq!(Storage::decode(&storage.encode()).unwrap(), storage);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Storage::decode(&bytes);
    }
}
