{{/* Takes undermesh off every node; `undermesh uninstall` applies it. */}}
{{- define "undermesh.uninstallNode" -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: undermesh-uninstall
  namespace: undermesh-system
  labels:
    app.kubernetes.io/name: undermesh-uninstall
    app.kubernetes.io/part-of: undermesh
spec:
  selector:
    matchLabels:
      app.kubernetes.io/name: undermesh-uninstall
  template:
    metadata:
      labels:
        app.kubernetes.io/name: undermesh-uninstall
        app.kubernetes.io/part-of: undermesh
    spec:
      automountServiceAccountToken: false
      {{- include "undermesh.pullSecrets" . | nindent 6 }}
      priorityClassName: system-node-critical
      tolerations:
        - operator: Exists
      nodeSelector:
        kubernetes.io/os: linux
      # Needs no pod network, and so not the plugin that it removes.
      hostNetwork: true
      terminationGracePeriodSeconds: 1
      securityContext:
        # On nodes with SELinux: files of the host.
        seLinuxOptions:
          type: spc_t
          level: s0
      initContainers:
        # Ends when no pod of the node is in the mesh any more; the agent, which takes them out, must run until then.
        - name: await
          image: {{ include "undermesh.image" (list $ "agent") }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [/opt/undermesh/bin/undermesh-uninstall, --await]
          securityContext:
            privileged: false
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            # It owns the files and pins, and needs no more to remove them (bpf(2) since Linux 5.19).
            runAsUser: 0
            capabilities:
              drop: [ALL]
          volumeMounts:
            - name: bpf
              mountPath: /sys/fs/bpf
        # Waits for the agent's end, then cleans up.
        - name: uninstall
          image: {{ include "undermesh.image" (list $ "agent") }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [/opt/undermesh/bin/undermesh-uninstall, --wait]
          securityContext:
            privileged: false
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            # It owns the files and pins, and needs no more to remove them (bpf(2) since Linux 5.19).
            runAsUser: 0
            capabilities:
              drop: [ALL]
          volumeMounts:
            - name: run
              mountPath: /run/undermesh
            - name: state
              mountPath: /var/lib/undermesh
            - name: bpf
              mountPath: /sys/fs/bpf
            - name: cni-bin
              mountPath: /opt/cni/bin
            - name: cni-conf
              mountPath: /etc/cni/net.d
            - name: cni-cache
              mountPath: /var/lib/cni
      # A DaemonSet's pods have to stay: ready means that their node is clean.
      containers:
        - name: done
          image: {{ include "undermesh.image" (list $ "agent") }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [sleep, infinity]
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
      volumes:
        # What the agent kept there is removed.
        - name: run
          hostPath:
            path: /run/undermesh
            type: DirectoryOrCreate
        # So is the list of enrolled namespaces.
        - name: state
          hostPath:
            path: /var/lib/undermesh
            type: DirectoryOrCreate
        # Pinned programs, maps and links.
        - name: bpf
          hostPath:
            path: /sys/fs/bpf
            type: Directory
        # The plugin.
        - name: cni-bin
          hostPath:
            path: {{ .Values.cni.binDir }}
            type: DirectoryOrCreate
        # The configuration that names it is restored.
        - name: cni-conf
          hostPath:
            path: {{ .Values.cni.confDir }}
            type: DirectoryOrCreate
        # Lists that running pods were started with: CRI-O ends them by these.
        - name: cni-cache
          hostPath:
            path: /var/lib/cni
            type: DirectoryOrCreate
{{- end -}}
