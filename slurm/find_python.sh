# Read by the jobs beside it, with their folder's parent in $home: sets $python to the one that has doccls.
[ ! -f "$home/slurm/env.sh" ] || . "$home/slurm/env.sh"
python=
for one in "$DOCCLS_PYTHON" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
  "$SLURM_SUBMIT_DIR/.venv/bin/python" "$home/.venv/bin/python" "$(command -v python3 || true)"; do
  # From another folder, so that this one's own source does not stand in for what is not installed.
  if [ -x "$one" ] && (cd / && "$one" -c 'import launcher.arguments') 2>/dev/null; then python=$one; break; fi
done
if [ -z "$python" ]; then
  printf '%s\n' '[EXIT] TRAINING ERROR code=1' >&2
  printf '[EXIT][ERROR] training failed: no Python with doccls on %s: make %s/.venv (make lint), or name one: %s\n' \
    "$(hostname)" "$home" 'export DOCCLS_PYTHON=... before sbatch, or in slurm/env.sh (docs/slurm.md)' >&2
  exit 1
fi
