// Command reference drives the Go implementation of CLIP, so that tests can set it against ours:
//
//	reference create DIR OUT           archive a directory (v1)
//	reference index REF OUT            index an image of a registry (v2)
//	reference dump ARCHIVE             one JSON line per node, then one of the storage info
//	reference extract ARCHIVE DIR      unpack a local v1 archive
//	reference mount ARCHIVE DIR CACHE  mount, say "ready", serve until standard input ends
//	reference remote ARCHIVE OUT ENDPOINT BUCKET KEY
//	                                   write the index of a v1 archive whose data is an S3 object (.rclip)
//
// CACHE is a directory for layers, and empty for S3, whose keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/beam-cloud/clip/pkg/common"
	"github.com/beam-cloud/clip/pkg/storage"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: create|index|dump|extract|mount|remote ARG ...")
	}
	if err := clip.SetLogLevel("error"); err != nil {
		return err
	}
	verb, args := args[0], append(args[1:], "", "", "", "")
	switch verb {
	case "create":
		return clip.CreateArchive(clip.CreateOptions{InputPath: args[0], OutputPath: args[1]})
	case "index":
		return clip.CreateFromOCIImage(context.Background(), clip.CreateFromOCIImageOptions{ImageRef: args[0], OutputPath: args[1]})
	case "dump":
		return dump(args[0])
	case "extract":
		// The modes it makes must not depend on who runs it.
		syscall.Umask(0)
		return clip.ExtractArchive(clip.ExtractOptions{InputFile: args[0], OutputPath: args[1]})
	case "mount":
		return mount(args[0], args[1], args[2])
	case "remote":
		return remote(args[0], args[1], &common.S3StorageInfo{
			Endpoint: args[2], Bucket: args[3], Key: args[4], Region: "us-east-1", ForcePathStyle: true,
		})
	}
	return fmt.Errorf("unknown verb %q", verb)
}

func dump(archive string) error {
	meta, err := clip.NewClipArchiver().ExtractMetadata(archive)
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	meta.Index.Ascend(nil, func(item interface{}) bool {
		err = out.Encode(item.(*common.ClipNode))
		return err == nil
	})
	if err != nil {
		return err
	}
	return out.Encode(map[string]any{"StorageInfo": meta.StorageInfo})
}

func remote(archive, out string, s3 *common.S3StorageInfo) error {
	archiver := clip.NewClipArchiver()
	meta, err := archiver.ExtractMetadata(archive)
	if err != nil {
		return err
	}
	return archiver.CreateRemoteArchive(s3, meta, out)
}

func mount(archive, dir, cache string) error {
	start, failed, server, err := clip.MountArchive(clip.MountOptions{
		ArchivePath: archive, MountPoint: dir, CachePath: cache, UseCheckpoints: true,
		// It follows this pointer unasked; without keys in it, it takes those of the environment.
		Credentials: storage.ClipStorageCredentials{S3: &storage.S3ClipStorageCredentials{}},
	})
	if err != nil {
		return err
	}
	if err := start(); err != nil {
		return err
	}
	if err := server.WaitMount(); err != nil {
		return err
	}
	fmt.Println("ready")
	done := make(chan struct{})
	go func() { io.Copy(io.Discard, os.Stdin); close(done) }()
	select {
	case err = <-failed:
	case <-done:
		err = server.Unmount()
	}
	return err
}
