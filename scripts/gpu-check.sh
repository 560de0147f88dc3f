#!/usr/bin/env bash
# All that a GPU is needed for, in one command: six or seven minutes on an H100 or H200 (estimated), nine at most.
#
#   make gpu-carry                        # makes the folder build/gpu-carry; take it to the machine with the GPU
#   scripts/gpu-check.sh [PART...]        # there, in that folder; parts are the names in the summary, default: all
#
# PYTHON (default python3) needs torch and torchvision. OUT (default gpu-check-output) gets six files: summary.txt,
# gpu-check.log, results.md, results.jsonl, trace-preconv.json.gz, trace-fit.json.gz. DEVICE=cpu rehearses it, tiny.
set -euo pipefail

mkdir -p "${OUT:=gpu-check-output}"
out=$(cd "$OUT" && pwd)
cd "$(dirname "$0")/.."
root=$PWD device=${DEVICE:-cuda} python=${PYTHON:-python3} wanted=("$@") failed=0
# A part gets what is left until here, in seconds.
stop=520
summary=$out/summary.txt log=$out/gpu-check.log results=$out/results.jsonl

if [[ ! -d site/cnnrs ]]; then
    echo "gpu-check: $root is not a folder that \`make gpu-carry\` has made" >&2
    exit 1
fi
# Nothing else that may lie about: what is tested is what was carried.
export PYTHONPATH=$root/site:$root/benches:$root/tests/python/support PYTHONUNBUFFERED=1
# Plug-ins of that machine may not go with this pytest; what crashes or is stopped says where it was.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONFAULTHANDLER=1
CNNRS_COMMIT=$(<commit)
export CNNRS_COMMIT
if [[ -d photos ]]; then export CNNRS_PHOTOS=$root/photos; fi
if ((${#wanted[@]} == 0)); then rm -f "$summary" "$log" "$results" "$out"/results.md "$out"/trace-*.json.gz; fi
touch "$results"

# part NAME SECONDS FILE PATTERN COMMAND...: runs it in a process of its own, after which FILE must have a line with
# PATTERN. FILE "-" is what the command printed.
part() {
    local name=$1 limit=$2 file=$3 pattern=$4 began=$SECONDS status=ok rc=0
    shift 4
    if ((${#wanted[@]})) && [[ " ${wanted[*]} " != *" $name "* ]]; then return; fi
    if ((limit > stop - SECONDS)); then limit=$((stop - SECONDS)); fi
    local printed
    printed=$(mktemp)
    if ((limit < 1)); then
        status="no time left"
    else
        timeout --signal=ABRT --kill-after=5 "$limit" "$@" >"$printed" 2>&1 || rc=$?
        case $rc in
        0)
            zgrep -qsE -- "$pattern" "${file/#-/$printed}" ||
                status="failed: no '$pattern' in ${file/#-/what it printed}"
            ;;
        124 | 137) status="failed: stopped after $limit s" ;;
        *) status="failed: exit code $rc" ;;
        esac
    fi
    [[ $status == ok ]] || failed=1
    local line
    line=$(printf '%-14s %4d s  %s' "$name" $((SECONDS - began)) "$status")
    { echo "===== $line" && cat "$printed" && echo; } >>"$log"
    echo "$line" | tee -a "$summary"
    [[ $status == ok ]] || tail -n 12 "$printed"
    rm -f "$printed"
}

if [[ $device == cuda ]]; then
    tests=(-m gpu) races=(control loader decoded preconv fit recorded) sanitizer=(TORCH_CUDA_SANITIZER=1)
else
    # Some that run on the CPU, too; those marked gpu are skipped.
    tests=(-k test_numbers_made_on_a_device) races=(all) sanitizer=()
    export OMP_WAIT_POLICY=passive
fi
# Whole folders: a fixture of their conftest may be what is marked.
mapfile -t folders < <(grep -rlE 'mark\.gpu\b' tests/python/*/ --include='*.py' --exclude-dir={support,package} |
    xargs -n1 dirname | sort -u)
# Hypothesis is compiled for one version of Python and not carried; test_marks.py watches that no test for a GPU is lost.
mapfile -t files < <(grep -rL '^from hypothesis' "${folders[@]}" --include='test_*.py' | sort)

part smoke 60 - "^preconv: " "$python" -m gpu.smoke "$device"
part ceilings 60 "$results" '"part": "ceilings"' "$python" -m gpu.ceilings "$device" "$out"
part tests 150 - "[0-9]+ passed" \
    "$python" -m pytest -v -rfE -p pytest_timeout --timeout 40 -p no:cacheprovider "${tests[@]}" "${files[@]}"
part preconv 240 "$results" '"part": "preconv"' "$python" -m gpu.features "$device" "$out"
part fit 150 "$results" '"part": "fit"' "$python" -m gpu.training "$device" "$out"
part trace 60 "$out/trace-fit.json.gz" traceEvents "$python" -m gpu.trace "$device" "$out"
for race in "${races[@]}"; do
    part "race-$race" 40 - "passed on $device" \
        env "${sanitizer[@]}" "$python" tests/python/support/races.py "$race" "$device"
done
# Of whatever has been measured by now.
stop=535
part report 10 "$out/results.md" "Predicted and found" "$python" -m gpu.report "$device" "$out"

echo
echo "gpu-check: $((SECONDS)) s on $device, $( ((failed)) && echo "something failed" || echo "all parts ok"), see $out"
cat "$summary"
exit "$failed"
