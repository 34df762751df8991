// The Go module's side of the golden tests: makes archives for us to read, and reads archives that we made.
//
//	golden make DIR    writes the fixtures (committed; made again only when a case is added)
//	golden dump FILE   prints what the module reads: storage info, then one node a line, as JSON; bytes in hex
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/rs/zerolog"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "golden:", err)
		os.Exit(1)
	}
}

func main() {
	zerolog.SetGlobalLevel(zerolog.Disabled)
	switch {
	case len(os.Args) == 3 && os.Args[1] == "make":
		makeFixtures(os.Args[2])
	case len(os.Args) == 3 && os.Args[1] == "dump":
		dump(os.Args[2])
	default:
		fmt.Fprintln(os.Stderr, "usage: golden make DIR | golden dump FILE")
		os.Exit(2)
	}
}

// ---- reading

type line struct {
	Path, Target     string
	Type             common.ClipNodeType
	Attr             fuse.Attr
	ContentHash      string
	DataPos, DataLen int64
	Remote           *common.RemoteRef
	Listed           []string
}

func dump(file string) {
	metadata, err := clip.NewClipArchiver().ExtractMetadata(file)
	check(err)
	out := json.NewEncoder(os.Stdout)
	check(out.Encode(map[string]any{"Storage": metadata.StorageInfo}))
	metadata.Index.Ascend(nil, func(item any) bool {
		node := item.(*common.ClipNode)
		l := line{
			Path: hex.EncodeToString([]byte(node.Path)), Target: hex.EncodeToString([]byte(node.Target)),
			Type: node.NodeType, Attr: node.Attr, ContentHash: node.ContentHash,
			DataPos: node.DataPos, DataLen: node.DataLen, Remote: node.Remote,
		}
		if node.IsDir() {
			for _, entry := range metadata.ListDirectory(node.Path) {
				l.Listed = append(l.Listed, hex.EncodeToString([]byte(entry.Name)))
			}
		}
		check(out.Encode(l))
		return true
	})
}

// ---- making

var stamp = time.Unix(1700000000, 123456789)

func makeFixtures(dir string) {
	check(os.MkdirAll(dir, 0o755))
	work, err := os.MkdirTemp("", "golden")
	check(err)
	defer os.RemoveAll(work)

	local := filepath.Join(dir, "v1-local.clip")
	source := filepath.Join(work, "source")
	makeSource(source)
	check(clip.CreateArchive(clip.CreateOptions{InputPath: source, OutputPath: local}))

	archiver := clip.NewClipArchiver()
	metadata, err := archiver.ExtractMetadata(local)
	check(err)
	check(archiver.CreateRemoteArchive(&common.S3StorageInfo{
		Bucket: "images", Region: "eu-central-1", Key: "golden/v1.clip", Endpoint: "http://127.0.0.1:9000", ForcePathStyle: true,
	}, metadata, filepath.Join(dir, "v1-remote.rclip")))

	v2 := filepath.Join(dir, "v2.clip")
	makeV2(v2)

	// A v2 index that was uploaded "to S3" by the module: its storage info says s3, its nodes lie in layers.
	metadata, err = archiver.ExtractMetadata(v2)
	check(err)
	check(archiver.CreateRemoteArchive(&common.S3StorageInfo{Bucket: "images", Key: "v2.clip"}, metadata,
		filepath.Join(dir, "v2-as-s3.rclip")))

	makeOld(dir)
	makeNewer(dir)
}

func makeSource(root string) {
	write := func(path, content string, mode os.FileMode) {
		path = filepath.Join(root, path)
		check(os.MkdirAll(filepath.Dir(path), 0o755))
		check(os.WriteFile(path, []byte(content), 0o600))
		check(os.Chmod(path, mode))
	}
	write("config.json", `{"ociVersion":"1.0.2","root":{"path":"rootfs"}}`, 0o644)
	write("rootfs/etc/hostname", "golden\n", 0o644)
	write("rootfs/usr/bin/tool", "#!/bin/sh\necho tool\n", 0o4755)
	write("rootfs/usr/lib/empty", "", 0o640)
	write("rootfs/usr/lib/lib.so", strings.Repeat("lib", 1000), 0o755)
	write("rootfs/usr/lib-x/\xffname", "odd", 0o600)
	check(os.Link(filepath.Join(root, "rootfs/etc/hostname"), filepath.Join(root, "rootfs/etc/hardlink")))
	check(os.Symlink("../etc/hostname", filepath.Join(root, "rootfs/usr/link")))
	check(os.Mkdir(filepath.Join(root, "rootfs/tmp"), 0o755))
	check(os.Chmod(filepath.Join(root, "rootfs/tmp"), 0o777|os.ModeSticky))
	check(filepath.Walk(root, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode()&os.ModeSymlink == 0 {
			err = os.Chtimes(path, stamp, stamp)
		}
		return err
	}))
}

func layer(entries []tar.Header, contents map[string]string) v1.Layer {
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	for _, header := range entries {
		content := contents[header.Name]
		header.Size, header.ModTime, header.Format = int64(len(content)), stamp.Truncate(time.Second), tar.FormatUnknown
		check(w.WriteHeader(&header))
		_, err := io.WriteString(w, content)
		check(err)
	}
	check(w.Close())
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, 9)
	check(err)
	_, err = z.Write(raw.Bytes())
	check(err)
	check(z.Close())
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(packed.Bytes())), nil
	})
	check(err)
	return layer
}

func makeV2(out string) {
	dir := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }
	file := func(name string, mode int64) tar.Header {
		return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Uid: 1000, Gid: 100}
	}
	lower := layer([]tar.Header{
		dir("./"), dir("./etc/"), file("./etc/hostname", 0o644), file("./etc/gone", 0o600), file("./usr/bin/tool", 0o4755),
		{Typeflag: tar.TypeLink, Name: "./usr/bin/alias", Linkname: "./usr/bin/tool"},
		{Typeflag: tar.TypeSymlink, Name: "./lib", Linkname: "usr/lib", Mode: 0o777},
		{Typeflag: tar.TypeLink, Name: "./lib-too", Linkname: "./lib"},
		dir("./var/run/"), file("./var/run/left-over", 0o644), file("./empty", 0o644),
	}, map[string]string{"./etc/hostname": "lower\n", "./etc/gone": "gone", "./usr/bin/tool": "#!/bin/sh\n", "./var/run/left-over": "x"})
	upper := layer([]tar.Header{
		file("etc/.wh.gone", 0), file("etc/hostname", 0o640),
		{Typeflag: tar.TypeSymlink, Name: "var/run", Linkname: "/run", Mode: 0o777},
	}, map[string]string{"etc/hostname": "upper layer\n"})
	image, err := mutate.AppendLayers(empty.Image, lower, upper)
	check(err)
	image, err = mutate.Config(image, v1.Config{
		Env: []string{"PATH=/usr/bin"}, Cmd: []string{"tool"}, Entrypoint: []string{"/bin/sh", "-c"}, User: "1000", WorkingDir: "/srv",
		Labels: map[string]string{"org.opencontainers.image.title": "golden"}, ExposedPorts: map[string]struct{}{"80/tcp": {}},
		Volumes: map[string]struct{}{"/data": {}}, StopSignal: "SIGINT",
	})
	check(err)
	image, err = mutate.CreatedAt(image, v1.Time{Time: stamp.In(time.FixedZone("", 3600))})
	check(err)
	config, err := image.ConfigFile()
	check(err)
	config.Architecture, config.OS, config.Author = "amd64", "linux", "somebody"
	image, err = mutate.ConfigFile(image, config)
	check(err)

	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	at := strings.TrimPrefix(server.URL, "http://") + "/library/golden:1"
	ref, err := name.ParseReference(at)
	check(err)
	check(remote.Write(ref, image))
	check(clip.CreateFromOCIImage(context.Background(), clip.CreateFromOCIImageOptions{
		ImageRef: at, StorageImageRef: "registry.example.com/library/golden:1", OutputPath: out,
		Platform: &v1.Platform{OS: "linux", Architecture: "amd64"},
	}))
}

func encode(value any) []byte {
	var out bytes.Buffer
	check(gob.NewEncoder(&out).Encode(value))
	return out.Bytes()
}

func writeArchive(file string, index []byte, kind string, info any) {
	var wrapped []byte
	if info != nil {
		wrapped = encode(common.StorageInfoWrapper{Type: kind, Data: encode(info)})
	}
	header := common.ClipArchiveHeader{
		ClipFileFormatVersion: common.ClipFileFormatVersion, IndexLength: int64(len(index)), IndexPos: common.ClipHeaderLength,
		StorageInfoLength: int64(len(wrapped)), StorageInfoPos: common.ClipHeaderLength + int64(len(index)),
	}
	copy(header.StartBytes[:], common.ClipFileStartBytes)
	copy(header.StorageInfoType[:], kind)
	bytes, err := clip.NewClipArchiver().EncodeHeader(&header)
	check(err)
	check(os.WriteFile(file, append(append(bytes, index...), wrapped...), 0o644))
}

// makeOld writes what earlier versions of the module wrote: types that lack the fields that came later.
func makeOld(dir string) {
	type ClipNode struct {
		NodeType         common.ClipNodeType
		Path             string
		Attr             fuse.Attr
		Target           string
		DataPos, DataLen int64
	}
	writeArchive(filepath.Join(dir, "old-v1.clip"), encode([]*ClipNode{
		{NodeType: common.DirNode, Path: "/", Attr: fuse.Attr{Ino: 1, Mode: 0o40755, Nlink: 2}},
		{NodeType: common.FileNode, Path: "/file", Attr: fuse.Attr{Ino: 2, Size: 5, Mode: 0o100644, Nlink: 1, Mtime: 1600000000}, DataPos: 55, DataLen: 5},
	}), "", nil)

	type OCIStorageInfo struct {
		RegistryURL, Repository, Reference string
		Layers                             []string
		GzipIdxByLayer                     map[string]*common.GzipIndex
	}
	layer := "sha256:" + strings.Repeat("ab", 32)
	writeArchive(filepath.Join(dir, "old-v2.clip"), encode([]*common.ClipNode{
		{NodeType: common.DirNode, Path: "/", Attr: fuse.Attr{Ino: 1, Mode: 0o40755, Nlink: 2}},
		{NodeType: common.FileNode, Path: "/file", Attr: fuse.Attr{Ino: 2, Size: 5, Mode: 0o100644, Nlink: 1, Mtime: 1600000000},
			Remote: &common.RemoteRef{LayerDigest: layer, UOffset: 512, ULength: 5}},
	}), "oci", OCIStorageInfo{
		RegistryURL: "index.docker.io", Repository: "library/old", Reference: "latest", Layers: []string{layer},
		GzipIdxByLayer: map[string]*common.GzipIndex{layer: {LayerDigest: layer, Checkpoints: []common.GzipCheckpoint{{COff: 10, UOff: 20}}}},
	})
}

type inner struct {
	Self *inner
	N    int
}

// late is a type that a stream meets first inside an interface inside an interface.
type late struct {
	Next any
	N    int
}

// makeNewer writes an index with fields that nobody knows yet, of every type that gob has.
func makeNewer(dir string) {
	gob.Register(inner{})
	gob.Register(map[string]any{})
	gob.Register(late{})
	gob.Register([]uint16{})
	type Owner struct{ Uid, Gid, Later uint32 }
	type Attr struct {
		Before      []float64
		Mode, Nlink uint32
		Owner
		Ino, Size uint64
		After     [3]int8
	}
	type ClipNode struct {
		Any        any
		Nil        any
		Later      time.Time
		NodeType   string
		Complex    complex128
		Nested     map[string]map[int][]inner
		Path       string
		Attr       *Attr
		Bytes      []byte
		Pointer    *inner
		DataPos    int64
		Array      [2][2]string
		DataLen    int64
		Set        map[string]struct{}
		Float      float32
		Flag       bool
		Zone       *time.Time
		Interfaces []any
	}
	full := ClipNode{
		Any: inner{Self: &inner{N: 300}, N: -1}, Later: stamp, NodeType: "file", Complex: complex(1.5, -2),
		Nested: map[string]map[int][]inner{"a": {1: {{N: 1}, {}}, -2: nil}}, Path: "/file",
		Attr:  &Attr{Before: []float64{0, 1, 1e300}, Mode: 0o100640, Nlink: 1, Owner: Owner{7, 8, 9}, Ino: 3, Size: 4, After: [3]int8{1, 0, -1}},
		Bytes: []byte("bytes"), Pointer: &inner{Self: &inner{}}, DataPos: 77, Array: [2][2]string{{"a", ""}, {"", "b"}}, DataLen: 4,
		Set: map[string]struct{}{"x": {}}, Float: 2.5, Flag: true, Zone: &stamp,
		Interfaces: []any{1, "two", nil, inner{N: 3}, map[string]any{"k": []byte{1}}, 4.5, map[string]any{"l": late{Next: []uint16{7, 300}, N: 3}}, "end"},
	}
	other := full
	other.Path, other.DataPos = "/other", 99
	writeArchive(filepath.Join(dir, "newer.clip"), encode([]ClipNode{
		{NodeType: "dir", Path: "/", Attr: &Attr{Mode: 0o40755}}, full, other,
	}), "", nil)
}
