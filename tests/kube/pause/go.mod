module clip-csi.test/pause

go 1.26.0
