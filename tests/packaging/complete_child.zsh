# The shell in the terminal of complete.zsh: prints offers instead of showing them.
PROMPT=
KEYTIMEOUT=1 # ^X also begins longer keys
unsetopt zle_bracketed_paste prompt_cr
fpath=($1 $fpath)
autoload -Uz compinit
compinit -u -D
zstyle ':completion:*' verbose no
compadd() {
  # With these options the caller only asks which words match.
  if [[ ${@[1,(i)(-|--)]} == *-[OAD]\ * ]]; then
    builtin compadd "$@"
    return
  fi
  local -a offers
  builtin compadd -O offers "$@"
  print -rl -- '' OFFER:$^offers
}
finish() {
  BUFFER=
  print -r -- ''
  print -r -- DONE
}
zle -N finish
bindkey '^I' complete-word
bindkey '^X' finish
print READY
