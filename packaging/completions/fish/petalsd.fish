# fish completion for petalsd(8) and petalsctl(1)

function __petalsd_instances
    set --local config $HOME/.config
    set --query XDG_CONFIG_HOME; and set config $XDG_CONFIG_HOME
    set --local runtime /nonexistent
    set --query XDG_RUNTIME_DIR; and set runtime $XDG_RUNTIME_DIR
    set --local files /etc/petalsd/*.toml $config/petalsd/*.toml
    set --local directories /run/petalsd/*/ $runtime/petalsd/*/
    string replace --regex '^.*/([^/]+?)(\.toml)?/?$' '$1' -- $files $directories | sort --unique
end

# The verb before the cursor: the first word that is neither an option nor an option's value.
function __petalsd_verb
    set --local is_value false
    for word in (commandline --tokenize --cut-at-cursor --current-process)[2..]
        if $is_value
            set is_value false
        else if contains -- $word -i --instance --socket
            set is_value true
        else if not string match --quiet -- '-*' $word
            echo $word
            return
        end
    end
end

# True where one of the verbs was given; without arguments, where none was.
function __petalsd_is
    set --local verb (__petalsd_verb)
    if set --query argv[1]
        contains -- "$verb" $argv
    else
        test -z "$verb"
    end
end

complete --command petalsd --command petalsctl --no-files
complete --command petalsd --command petalsctl --short-option h --long-option help --description 'show help'
complete --command petalsd --command petalsctl --condition __petalsd_is --long-option version --description 'print the version'

set --local of petalsctl
complete --command $of --short-option i --long-option instance --exclusive --arguments '(__petalsd_instances)' --description 'the instance, as in petalsd@NAME'
complete --command $of --long-option socket --require-parameter --force-files --description 'the control socket of the daemon'
complete --command $of --long-option json --description 'print the document as the daemon sent it'
complete --command $of --long-option no-color --description 'print no colours'
complete --command $of --condition __petalsd_is --arguments status --description 'show what the daemon is doing'
complete --command $of --condition __petalsd_is --arguments sessions --description 'list the sessions of clients'
complete --command $of --condition __petalsd_is --arguments peers --description 'list the servers of the swarm'
complete --command $of --condition __petalsd_is --arguments drain --description 'let running sessions finish and refuse new ones'
complete --command $of --condition __petalsd_is --arguments resume --description 'serve again after a drain'
complete --command $of --condition __petalsd_is --arguments rebalance --description 'choose blocks again'
complete --command $of --condition __petalsd_is --arguments reload --description 'read the configuration again'
complete --command $of --condition __petalsd_is --arguments wait --description 'wait until the daemon serves, is drained or is gone'
complete --command $of --condition __petalsd_is --arguments metrics --description 'print the metrics'
complete --command $of --condition __petalsd_is --arguments doctor --description 'look for what is wrong with this machine'
complete --command $of --condition __petalsd_is --arguments generate --description 'continue a prompt'
complete --command $of --condition __petalsd_is --arguments version --description 'print the versions'
complete --command $of --condition '__petalsd_is status' --short-option w --long-option watch --description redraw
complete --command $of --condition '__petalsd_is status' --long-option interval --exclusive --description 'seconds between redraws'
complete --command $of --condition '__petalsd_is drain' --long-option deadline --exclusive --description 'end what is left after so many seconds'
complete --command $of --condition '__petalsd_is drain' --long-option wait --description 'until no session is left'
complete --command $of --condition '__petalsd_is rebalance' --long-option to --exclusive --description 'these blocks, start:end'
complete --command $of --condition '__petalsd_is rebalance' --long-option dry-run --description 'change nothing'
complete --command $of --condition '__petalsd_is rebalance' --long-option wait --description 'until it is done'
complete --command $of --condition '__petalsd_is wait' --long-option ready --description 'until it serves'
complete --command $of --condition '__petalsd_is wait' --long-option drained --description 'until no session is left'
complete --command $of --condition '__petalsd_is wait' --long-option offline --description 'until it has ended'
complete --command $of --condition '__petalsd_is wait' --long-option timeout --exclusive --description 'give up after so many seconds'

set of petalsd
complete --command $of --condition __petalsd_is --arguments run --description 'serve blocks of a model until stopped'
complete --command $of --condition __petalsd_is --arguments check --description 'validate without serving'
complete --command $of --condition __petalsd_is --arguments show --description 'print the effective configuration'
complete --command $of --condition __petalsd_is --arguments generate --description 'continue a prompt through a swarm'
complete --command $of --condition __petalsd_is --arguments gateway --description 'answer HTTP requests through a swarm'
complete --command $of --condition '__petalsd_is run check show' --short-option i --long-option instance --exclusive --arguments '(__petalsd_instances)' --description 'the instance'
complete --command $of --condition '__petalsd_is run check show' --short-option c --long-option config --require-parameter --force-files --description 'configuration file'
complete --command $of --condition '__petalsd_is run check show' --long-option set --exclusive --description 'override one key'
complete --command $of --condition '__petalsd_is check show' --long-option json --description 'print JSON'

for of in petalsd petalsctl
    complete --command $of --condition '__petalsd_is generate gateway' --long-option model --require-parameter --force-files --description 'Hub repository or directory'
    complete --command $of --condition '__petalsd_is generate gateway' --long-option peers --exclusive --arguments public --description 'members of the swarm'
    complete --command $of --condition '__petalsd_is generate gateway' --long-option dht-prefix --exclusive --description 'what the servers call the model'
    complete --command $of --condition '__petalsd_is generate gateway' --long-option identity --require-parameter --force-files --description 'private key of this client'
    complete --command $of --condition '__petalsd_is generate gateway' --long-option adapter --exclusive --description 'LoRA adapter of the servers'
    complete --command $of --condition '__petalsd_is generate' --long-option max-new-tokens --exclusive --description 'how long the answer may get'
    complete --command $of --condition '__petalsd_is generate' --long-option temperature --exclusive --description '0: the likeliest token'
    complete --command $of --condition '__petalsd_is generate' --long-option top-p --exclusive --description 'share of the probability that is sampled from'
    complete --command $of --condition '__petalsd_is generate' --long-option seed --exclusive --description 'makes sampling repeatable'
    complete --command $of --condition '__petalsd_is generate' --long-option chat --description 'wrap the prompt in the chat template'
    complete --command $of --condition '__petalsd_is generate gateway' --long-option dtype --exclusive --arguments 'auto float32 bfloat16 float16' --description 'of the local parts of the model'
    complete --command $of --condition '__petalsd_is generate gateway' --long-option log-level --exclusive --arguments 'debug info warning error' --description 'what goes to standard error'
end

set of petalsd
complete --command $of --condition '__petalsd_is gateway' --long-option listen --exclusive --description 'where requests are taken'
complete --command $of --condition '__petalsd_is gateway' --long-option name --exclusive --description 'what the model is called there'
complete --command $of --condition '__petalsd_is gateway' --long-option api-keys --require-parameter --force-files --description 'keys of those who may ask'
complete --command $of --condition '__petalsd_is gateway' --long-option max-answers --exclusive --description 'made at the same time'
