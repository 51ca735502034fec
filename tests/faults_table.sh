#!/usr/bin/env bash
# Lets every driver call fail on the stub driver (tests/faults.rs), and writes what came of it to docs/faults.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
cargo test --locked --features cuda-pin --test faults -- --nocapture --test-threads=1 >"$log" 2>&1 || {
  cat "$log" >&2
  exit 1
}
total=$(awk '/^[0-9]+ injections$/ { sum += $1 } END { print sum }' "$log")
{
  cat <<TEXT
# What comes of failing driver calls

\`make faults\` wrote this. Every scenario runs once on the stub driver of \`tests/stub-cuda\` to count its driver calls.
Then it runs again for each of them and each error that the call can give: $total times in all. After each the results
are right or the caller was told, the caller's current context is what it was, and all that was taken from the driver
is given back; a test fails otherwise. The same tests run in \`make test\`.

*Calls* is how often the scenario makes the call, *errors* how many were injected. What came of it, by the driver's code:

| outcome | means |
|---|---|
| tolerated | nothing is lost: the results are right |
| error; the next call works | the call returned an error that names the driver's call and the device |
| error; stopped | some ranks had begun: every later call says why, until \`reset\` |
| error; broken | the device's context is lost until the process ends, as the real driver has it; every call says so |
| logged | something could not be given back as usual; it was logged, and the ledger is zero |

| code | error | code | error |
|---|---|---|---|
| 1 | invalid value | 400 | invalid handle |
| 2 | out of memory | 500 | not found |
| 3, 4 | not or no longer initialized | 700 | illegal address (breaks the context) |
| 46 | device unavailable | 701 | launch out of resources |
| 100, 101 | no or invalid device | 702 | launch timeout (breaks the context) |
| 201 | invalid context | 704 | peer access already enabled |
| 209 | no binary for the GPU | 711 | too many peers |
| 214 | uncorrectable ECC error (breaks the context) | 716 | misaligned address (breaks the context) |
| 217 | peer access unsupported | 719 | launch failed (breaks the context) |
| 218, 222 | invalid or unsupported PTX | 800, 803 | not permitted, driver mismatch |
| | | 900, 905, 906 | not during a capture |
| | | 999 | unknown |

| scenario | call | calls | errors | codes: what came of them |
|---|---|---|---|---|
TEXT
  grep '^| ' "$log" | sed -e 's/; the communicator says that it stopped, and works after a reset/; stopped/g' \
    -e 's/; the context is broken and every call says so/; broken/g' -e 's/logged; all is given back/logged/g' |
    LC_ALL=C sort
} >docs/faults.md
echo "docs/faults.md: $total injections"
