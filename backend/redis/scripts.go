package redis

import (
	_ "embed"

	goredis "github.com/redis/go-redis/v9"
)

//go:embed append.lua
var appendSource string

//go:embed close.lua
var closeSource string

//go:embed incarnation.lua
var incarnationSource string

//go:embed lock.lua
var lockSource string

var (
	appendScript      = newScript(appendSource)
	closeScript       = newScript(closeSource)
	incarnationScript = newScript(incarnationSource)
	lockScript        = newScript(lockSource)
)

type script struct{ hash, source string }

func newScript(source string) script {
	return script{hash: goredis.NewScript(source).Hash(), source: source}
}

func (s script) evalsha(keys []string, args []any) []any {
	return command("EVALSHA", s.hash, keys, args)
}
func (s script) eval(keys []string, args []any) []any { return command("EVAL", s.source, keys, args) }

func command(name, what string, keys []string, args []any) []any {
	cmd := make([]any, 0, 4+len(keys)+len(args)) // one more for what follows
	cmd = append(cmd, name, what, len(keys))
	for _, k := range keys {
		cmd = append(cmd, k)
	}
	return append(cmd, args...)
}

func isNoScript(err error) bool {
	return err != nil && goredis.HasErrorPrefix(err, "NOSCRIPT")
}
