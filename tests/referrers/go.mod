module github.com/beam-cloud/clip-csi/tests/referrers

go 1.25.0

require github.com/google/go-containerregistry v0.22.1
