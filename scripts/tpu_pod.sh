#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU slice, from this machine, in this checkout:
#
#     scripts/tpu_pod.sh configs/llama2-7b-boolq.yaml data.train=data/boolq
#
# Sends the checkout (tracked files and untracked ones that git does not ignore) to every host, makes a Python 3.12
# environment there, and starts `para-jax train` with these arguments on all hosts. The same command resumes. It stops at
# once if a run is still going on a host. If HF_TOKEN is set, it is sent as a file that each host deletes when the run has
# read it. See docs/scaling.md, also for spot slices. Not run on a TPU yet.
set -euo pipefail

TPU=${TPU:-my-slice}          # the slice's name
ZONE=${ZONE:-us-west4-a}      # its zone
PROJECT=${PROJECT:-my-project}

[ $# -ge 1 ] || { echo "usage: scripts/tpu_pod.sh CONFIG [section.field=value ...]" >&2; exit 2; }

on_all() { # on_all ssh|scp ARGUMENTS: gcloud, on every host of the slice; --quiet: it asks nothing
  gcloud compute tpus tpu-vm "$@" --zone="$ZONE" --project="$PROJECT" --worker=all --quiet
}

cd "$(dirname "$0")/.."
umask 077
sent=$(mktemp -d)
trap 'rm -rf "$sent"' EXIT

# A lost connection ends neither the run on the hosts nor its hold on the chips. (The brackets keep pgrep from finding itself.)
# shellcheck disable=SC2016  # the hosts expand it
on_all ssh "$TPU" --command='set -eu
if pgrep -f "$HOME/para_jax/.venv/bin/[p]ara-jax" > /dev/null; then
  echo "$(hostname): a run is still going here; wait for its end, or stop it as docs/scaling.md says" >&2
  exit 1
fi'

git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
  if [ -d "$file" ] && [ ! -L "$file" ]; then find "./${file%/}" ! -type d -print0 # a repository inside this one
  elif [ -e "$file" ] || [ -L "$file" ]; then printf '%s\0' "$file"; fi # git still lists a file that was deleted here
done > "$sent/para_jax.files"
tar -czf "$sent/para_jax.tar.gz" --null -T "$sent/para_jax.files"
on_all scp "$sent/para_jax.tar.gz" "$sent/para_jax.files" "$TPU:"

# Files that were sent before are removed first: one that is gone here, such as a tenant's data, must not be trained on.
# An environment that a kill left in pieces has no Python, and is made again.
# shellcheck disable=SC2016  # the hosts expand it
on_all ssh "$TPU" --command='set -eu
export PATH="$HOME/.local/bin:$PATH"
mkdir -p para_jax && cd para_jax
if [ -f .sent ]; then
  xargs -0 rm -f -- < .sent
  xargs -0 dirname -z -- < .sent | sort -zu | xargs -0 rmdir -p 2> /dev/null || true # only empty folders go
fi
mv ../para_jax.files .sent && tar -xzf ../para_jax.tar.gz
# pip refuses where the system manages Python, as Ubuntu 24.04 does; uv has an installer of its own.
command -v uv > /dev/null || python3 -m pip install --quiet --user uv || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x .venv/bin/python ] || { rm -rf .venv; uv venv --quiet --seed --python 3.12; }
uv pip install --quiet -e ".[tpu,gcs]"'

if [ -n "${HF_TOKEN:-}" ]; then
  printf '%s' "$HF_TOKEN" > "$sent/para_jax.token" # printf is the shell's own: the token is in no list of processes
  on_all scp "$sent/para_jax.token" "$TPU:"
fi

on_all ssh "$TPU" --command="set -eu
cd para_jax
if [ -f ../para_jax.token ]; then HF_TOKEN=\$(cat ../para_jax.token); export HF_TOKEN; rm ../para_jax.token; fi
exec \"\$HOME/para_jax/.venv/bin/para-jax\" train $(printf '%q ' "$@")runtime.coordinator=auto"
