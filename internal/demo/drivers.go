package main

import (
	"context"
	"log/slog"

	goredis "github.com/redis/go-redis/v9"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

// driver starts a server, and connects to one.
type driver struct {
	start   func(ctx context.Context) (*testserver.Server, error)
	connect func(ctx context.Context, addr string) (b dchannel.Backend, stop func(), err error)
}

// quiet: the demo says itself when it cuts.
var quiet = slog.New(slog.DiscardHandler)

var drivers = map[string]driver{
	"redis": {
		start: func(ctx context.Context) (*testserver.Server, error) {
			return testserver.StartRedis(ctx, testserver.RedisConfig{})
		},
		connect: func(_ context.Context, addr string) (dchannel.Backend, func(), error) {
			client := goredis.NewClient(&goredis.Options{Addr: addr})
			b := redis.New(client, redis.WithLogger(quiet))
			return b, func() { _ = b.Close(); _ = client.Close() }, nil
		},
	},
}
