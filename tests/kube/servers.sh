# shellcheck shell=bash
# A registry and an S3 server for tests, as children of the caller. Sourced; `stop_servers` ends them all.
server_pids=()

# Waits until something answers at address:port; fails when the process ends before.
await_port() { # address port pid log
  local deadline=$((SECONDS + 60))
  until (exec 3<> "/dev/tcp/$1/$2") 2> /dev/null; do
    if [ ! -d "/proc/$3" ] || [ $SECONDS -ge $deadline ]; then
      echo "nothing listens on $1:$2:" >&2
      tail -n 20 "$4" >&2
      return 1
    fi
    sleep 0.1
  done
}

# Debian's docker-registry. With a third argument, only for user reader, password secret-pw.
start_registry() { # directory address:port [login]
  local dir=$1 address=$2
  mkdir -p "$dir"
  {
    printf 'version: 0.1\nlog: {level: warn}\nstorage: {filesystem: {rootdirectory: %s/data}, delete: {enabled: true}}\n' "$dir"
    printf 'http: {addr: "%s"}\n' "$address"
    [ -z "${3:-}" ] || printf 'auth: {htpasswd: {realm: test, path: %s/htpasswd}}\n' "$dir"
  } > "$dir/config.yml"
  # bcrypt of secret-pw
  # shellcheck disable=SC2016
  echo 'reader:$2b$05$abcdefghijklmnopqrstuutaz/SHXsrvqy/ChnunBIcMuq4PCR.gG' > "$dir/htpasswd"
  docker-registry serve "$dir/config.yml" > "$dir/log" 2>&1 &
  server_pids+=($!)
  await_port "${address%:*}" "${address#*:}" $! "$dir/log"
}

# versitygw over a directory: keys test-id, test-key; its buckets are the directory's directories.
start_s3() { # directory address:port versitygw
  local dir=$1 address=$2
  mkdir -p "$dir"/{data,sidecar}
  ROOT_ACCESS_KEY=test-id ROOT_SECRET_KEY=test-key "$3" --port "$address" --region us-east-1 posix --sidecar "$dir/sidecar" "$dir/data" \
    > "$dir/log" 2>&1 &
  server_pids+=($!)
  await_port "${address%:*}" "${address#*:}" $! "$dir/log"
}

stop_servers() {
  local pid
  for pid in "${server_pids[@]}"; do kill "$pid" 2> /dev/null && wait "$pid" 2> /dev/null; done
  server_pids=()
}
