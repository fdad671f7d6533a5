package main

import (
	"context"
	"log/slog"
	"time"

	natsgo "github.com/nats-io/nats.go"
	goredis "github.com/redis/go-redis/v9"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/backend/nats"
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
	"nats": {
		start: func(ctx context.Context) (*testserver.Server, error) {
			return testserver.StartNATS(ctx, testserver.NATSConfig{})
		},
		connect: func(_ context.Context, addr string) (dchannel.Backend, func(), error) {
			conn, err := natsgo.Connect("nats://"+addr, natsgo.MaxReconnects(-1), natsgo.ReconnectWait(20*time.Millisecond))
			if err != nil {
				return nil, nil, err
			}
			b := nats.New(conn, nats.WithLogger(quiet))
			return b, func() { _ = b.Close(); conn.Close() }, nil
		},
	},
	"etcd": {
		start: func(ctx context.Context) (*testserver.Server, error) {
			return testserver.StartEtcd(ctx, testserver.EtcdConfig{})
		},
		connect: func(_ context.Context, addr string) (dchannel.Backend, func(), error) {
			client, err := clientv3.New(clientv3.Config{
				Endpoints: []string{"http://" + addr}, DialKeepAliveTime: 10 * time.Second, Logger: zap.NewNop(),
			})
			if err != nil {
				return nil, nil, err
			}
			b := etcd.New(client, etcd.WithLogger(quiet))
			return b, func() { _ = b.Close(); _ = client.Close() }, nil
		},
	},
}
