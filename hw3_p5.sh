#!/usr/bin/env bash
# Problem 5: draw ten digits of each class by diffusion in one picture, or 100 of each in a folder; on any machine nearly the same.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash hw3_p5.sh OUT.png (or .jpg, .jpeg), or bash hw3_p5.sh FOLDER" >&2; exit 2; }
name=p5_conditional.pth here=$(python3 -c 'import os, sys; sys.stdout.buffer.write(os.path.dirname(os.path.realpath(os.fsencode(sys.argv[1]))))' "$0")
file=$here/checkpoints/$name fix="set CHECKPOINT_URL, or the line in checkpoints/URL, to the address of its folder"
fail() { echo "hw3_p5.sh: $name $1" >&2; exit 1; }
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
exec python3 "$here/p5_conditional.py" --ckpt="$file" --out="$1"
