#!/usr/bin/env bash
# Problem 3: label a folder of digits of one target domain with DANN.
set -euo pipefail
usage() { echo "$1" >&2; exit 2; }
[ $# -eq 3 ] || usage "usage: bash hw3_p3.sh FOLDER TARGET OUT.csv (TARGET: mnistm, svhn or usps)"
case $2 in mnistm | svhn | usps) ;; *) usage "hw3_p3.sh: there is no target '$2': choose mnistm, svhn or usps" ;; esac
name=p3_dann_$2.pth here=$(python3 -c 'import os, sys; sys.stdout.buffer.write(os.path.dirname(os.path.realpath(os.fsencode(sys.argv[1]))))' "$0")
file=$here/checkpoints/$name fix="set CHECKPOINT_URL, or the line in checkpoints/URL, to the address of its folder"
fail() { echo "hw3_p3.sh: $name $1" >&2; exit 1; }
good() { [ -f "$1" ] && [ "$(python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1")" = "${sum%% *}" ]; }
sum=$(grep -s "  $name" "$here/checkpoints/SHA256SUMS") || fail "has no line in checkpoints/SHA256SUMS: restore that file with git"
if ! good "$file"; then
  url=${CHECKPOINT_URL:-$(head -n 1 "$here/checkpoints/URL" 2>/dev/null | tr -d '\r' || true)}
  [ -n "$url" ] || fail "is missing or damaged, and no address is known: $fix"
  for try in "the rest" "anew"; do   # if the continued file has a wrong SHA-256, once more from the start
    wget -q -c -T 30 -t 3 -O "$file.part" "${url%/}/$name" 2>/dev/null || fail "did not come from $url (wget says $?; 3: cannot write checkpoints/, 4: no network or no such host, 5: its certificate is not trusted, 8: the server refused or lacks it, 127: no wget): $fix"
    if good "$file.part"; then break; elif [ "$try" = anew ]; then : > "$file.part"; fail "from $url has a wrong SHA-256: $fix"; fi
    : > "$file.part"
  done
  python3 -c 'import os, sys; os.replace(*sys.argv[1:])' "$file.part" "$file"
fi
exec python3 "$here/p3_dann.py" --ckpt="$file" --images="$1" --target="$2" --out="$3"
