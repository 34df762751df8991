{{- define "clip-csi.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 44 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 44 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 44 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What pods are selected by: never changes in the life of a release. */}}
{{- define "clip-csi.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "clip-csi.labels" -}}
{{- $labels := include "clip-csi.selector" . | fromYaml -}}
{{- $_ := set $labels "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- $_ := set $labels "app.kubernetes.io/version" .Chart.AppVersion -}}
{{- $_ := set $labels "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $labels "app.kubernetes.io/part-of" "clip-csi" -}}
{{- mergeOverwrite $labels .Values.commonLabels | toYaml -}}
{{- end -}}

{{/* Of pods: nothing that changes with the chart, since another label means another pod, and that interrupts volumes. */}}
{{- define "clip-csi.podLabels" -}}
{{- $labels := include "clip-csi.selector" .root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/part-of" "clip-csi" -}}
{{- $_ := set $labels "app.kubernetes.io/component" .component -}}
{{- mergeOverwrite $labels .root.Values.commonLabels .labels | toYaml -}}
{{- end -}}

{{/* The labels of every object, and some more. Takes (dict "root" $ "labels" more). */}}
{{- define "clip-csi.moreLabels" -}}
{{- mergeOverwrite (include "clip-csi.labels" .root | fromYaml) (default dict .labels) | toYaml -}}
{{- end -}}

{{/* repository:tag or repository@digest. Takes (dict "image" … "tag" default tag). */}}
{{- define "clip-csi.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .tag .image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "clip-csi.nodeServiceAccount" -}}
{{- default (printf "%s-node" (include "clip-csi.fullname" .)) .Values.node.serviceAccount.name -}}
{{- end -}}

{{- define "clip-csi.controllerServiceAccount" -}}
{{- default (printf "%s-controller" (include "clip-csi.fullname" .)) .Values.controller.serviceAccount.name -}}
{{- end -}}

{{/* Bytes of a size like 20Gi. The schema lets no other shape through. */}}
{{- define "clip-csi.bytes" -}}
{{- $number := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[A-Za-z]+$" . -}}
{{- $factor := get (dict "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776) $unit | int64 -}}
{{- mul $number $factor -}}
{{- end -}}

{{/* The sections of the configuration that node and controller share. Takes (dict "root" $ "archives" size "node" true or false). */}}
{{- define "clip-csi.config" -}}
{{- $images := .root.Values.config.imageService -}}
{{- $sources := .root.Values.config.sources -}}
imageService:
  # What is built from an image: 2 is an index over the image's layers, 0 or 1 an archive with all of its data.
  # Archives of both versions mount, whatever is set here.
  clipVersion: {{ $images.clipVersion }}
  archiveDir: /var/lib/clip-csi/archives
  archiveMaxBytes: {{ include "clip-csi.bytes" .archives }}
  {{- with $images.archiveStore }}
  archiveStore: {{ . | quote }}
  {{- end }}
  spanKib: {{ $images.spanKib | int64 }}
  checkpointMib: {{ $images.checkpointMib | int64 }}
  tablesOfContents: {{ $images.tablesOfContents }}
  referrers: {{ $images.referrers }}
  archiveGraceHours: {{ $images.archiveGraceHours | int64 }}
sources:
  archiveRoots: {{ toJson $sources.archiveRoots }}
  {{- if $sources.s3 }}
  s3:
  {{- toYaml $sources.s3 | nindent 2 }}
  {{- else }}
  s3: []
  {{- end }}
  {{- if $sources.registries }}
  registries:
  {{- toYaml $sources.registries | nindent 4 }}
  {{- else }}
  registries: {}
  {{- end }}
k8s:
  events: {{ .root.Values.config.k8s.events }}
  removeStartupTaint: {{ and .node .root.Values.startupTaint.enabled }}
  startupTaint: {{ .root.Values.startupTaint.key }}
csi:
  driverName: {{ .root.Values.driverName }}
  kubeletDir: {{ .root.Values.kubeletDir | quote }}
  publishWaitSeconds: {{ .root.Values.config.csi.publishWaitSeconds | int64 }}
  shutdownSeconds: {{ .root.Values.config.csi.shutdownSeconds | int64 }}
telemetry:
  logFormat: {{ .root.Values.config.telemetry.logFormat }}
  logLevel: {{ .root.Values.config.telemetry.logLevel | quote }}
  httpListen: {{ printf "%s:%d" .root.Values.metrics.address (.root.Values.metrics.port | int64) | quote }}
{{- end -}}

{{- define "clip-csi.nodeConfig" -}}
{{ include "clip-csi.config" (dict "root" . "archives" .Values.node.archives.size "node" true) }}
cache:
  dir: /var/lib/clip-csi/cache
  maxBytes: {{ include "clip-csi.bytes" .Values.node.cache.size }}
  highWatermark: {{ .Values.config.cache.highWatermark | int64 }}
  lowWatermark: {{ .Values.config.cache.lowWatermark | int64 }}
mounts:
  stateDir: /var/lib/clip-csi/volumes
{{- end -}}

{{- define "clip-csi.controllerConfig" -}}
{{ include "clip-csi.config" (dict "root" . "archives" .Values.controller.archives.size "node" false) }}
{{- end -}}

{{/* Alive is: the process answers. Ready is: it can do its work. Start-up may take a while where the cache is large. */}}
{{- define "clip-csi.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 2
  failureThreshold: 150
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  failureThreshold: 6
  timeoutSeconds: 5
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 5
  failureThreshold: 2
  timeoutSeconds: 7
{{- end -}}
