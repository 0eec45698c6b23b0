{{- define "deltamux.name" -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}-server
{{- end -}}

{{- define "deltamux.selector" -}}
app.kubernetes.io/name: deltamux
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "deltamux.locked" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "deltamux.labels" -}}
{{ include "deltamux.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}
