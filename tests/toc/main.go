// Command toc writes a tar as a layer that carries a table of contents, by the libraries that such layers are made with in the field.
//
//	toc estargz|estargz-lossless|estargz-shared|zstd-stargz|zstd-chunked IN.tar OUT
//
// It prints JSON: the layer's annotations, and the diff ID of its uncompressed bytes.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/containers/storage/pkg/chunked/compressor"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

func main() {
	if len(os.Args) != 4 {
		fail(fmt.Errorf("usage: toc KIND IN.tar OUT"))
	}
	annotations, err := write(os.Args[1], os.Args[2], os.Args[3])
	fail(err)
	diffID, err := diffID(os.Args[3])
	fail(err)
	fail(json.NewEncoder(os.Stdout).Encode(map[string]any{"annotations": annotations, "diffID": diffID}))
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "toc:", err)
		os.Exit(1)
	}
}

func write(kind, in, out string) (map[string]string, error) {
	tar, err := os.ReadFile(in)
	if err != nil {
		return nil, err
	}
	file, err := os.Create(out)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	annotations := map[string]string{}
	stargz := func(w *estargz.Writer, lossless bool) error {
		w.ChunkSize = 1 << 20
		append := w.AppendTar
		if lossless {
			append = w.AppendTarLossLess
		}
		if err := append(bytes.NewReader(tar)); err != nil {
			return err
		}
		toc, err := w.Close()
		annotations[estargz.TOCJSONDigestAnnotation] = toc.String()
		return err
	}
	switch kind {
	case "estargz":
		// As ctr-remote and nerdctl do: sorted, with a landmark.
		reader := bytes.NewReader(tar)
		section := io.NewSectionReader(reader, 0, reader.Size())
		blob, err := estargz.Build(section, estargz.WithChunkSize(1<<20))
		if err != nil {
			return nil, err
		}
		defer blob.Close()
		if _, err := io.Copy(file, blob); err != nil {
			return nil, err
		}
		annotations[estargz.TOCJSONDigestAnnotation] = blob.TOCDigest().String()
	case "estargz-lossless":
		return annotations, stargz(estargz.NewWriter(file), true)
	case "estargz-shared":
		w := estargz.NewWriter(file)
		w.MinChunkSize = 64 << 10
		return annotations, stargz(w, false)
	case "zstd-stargz":
		c := &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations}
		return annotations, stargz(estargz.NewWriterWithCompressor(file, c), false)
	case "zstd-chunked":
		level := 3
		w, err := compressor.ZstdCompressor(file, annotations, &level)
		if err != nil {
			return nil, err
		}
		if _, err := w.Write(tar); err != nil {
			return nil, err
		}
		return annotations, w.Close()
	default:
		return nil, fmt.Errorf("kind %q is not known", kind)
	}
	return annotations, nil
}

func diffID(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	magic := make([]byte, 4)
	if _, err := io.ReadFull(file, magic); err != nil {
		return "", err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	hash := sha256.New()
	var reader io.Reader
	if magic[0] == 0x1f {
		reader, err = gzip.NewReader(file)
	} else {
		var decoder *zstd.Decoder
		decoder, err = zstd.NewReader(file)
		reader = decoder
	}
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(hash, reader); err != nil {
		return "", err
	}
	return fmt.Sprintf("sha256:%x", hash.Sum(nil)), nil
}
