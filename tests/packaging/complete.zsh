# zsh -f complete.zsh DIRECTORY LINE...: prints what zsh offers at the end of each LINE, with the functions in DIRECTORY.
zmodload zsh/zpty || exit 77
zpty terminal zsh -f -i
zpty -w terminal "source $0:A:h/complete_child.zsh ${(q)1}"
zpty -r terminal ignored '*READY*' || exit 1
shift
for line; do
  zpty -w -n terminal "$line"$'\t\C-X'
  zpty -r terminal answer '*DONE*' || exit 1
  print -r -- LINE
  print -rl -- ${(M)${(f)answer//$'\r'/}:#OFFER:*}
done
