# Sourced by the other scripts: -h or --help among the arguments prints the comment at the script's head, and that is all.
for word in "$@"; do
    case $word in
    -h | --help)
        awk 'NR > 1 { if (!sub(/^# ?/, "")) exit; print }' "$0"
        exit 0
        ;;
    esac
done
