package testserver_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel/internal/testserver"
)

// urls lists the nodes for a client.
func urls(nodes []*testserver.Server) (list []string) {
	for _, s := range nodes {
		list = append(list, s.URL())
	}
	return list
}

func addrs(nodes []*testserver.Server) (list []string) {
	for _, s := range nodes {
		list = append(list, s.Addr())
	}
	return list
}

func TestRedisClusterFailsOver(t *testing.T) {
	t.Parallel()
	nodes := testserver.RedisClusterForTest(t, 3, 3, testserver.RedisConfig{Password: "pw"})
	c := goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: addrs(nodes), Password: "pw"})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	for i := range 50 { // of all masters
		require.NoError(t, c.Set(t.Context(), fmt.Sprint(i), i, 0).Err())
	}
	require.NoError(t, nodes[0].Kill())
	for i := range 50 {
		within(t, func(ctx context.Context) error {
			c.ReloadState(ctx) // by itself it looks once a minute
			return c.Set(ctx, fmt.Sprint(i), i, 0).Err()
		})
	}
	require.NoError(t, nodes[0].Restart(t.Context()))
}

func TestRedisClusterTLS(t *testing.T) {
	t.Parallel()
	nodes := testserver.RedisClusterForTest(t, 3, 0, testserver.RedisConfig{TLS: testserver.MutualTLS})
	c := goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: addrs(nodes), TLSConfig: nodes[0].TLS()})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	for i := range 50 {
		require.NoError(t, c.Set(t.Context(), fmt.Sprint(i), i, 0).Err())
	}
}

func TestRedisSentinelFailsOver(t *testing.T) {
	t.Parallel()
	r := testserver.RedisSentinelForTest(t, 2, 3, testserver.RedisConfig{Password: "pw"})
	c := goredis.NewFailoverClient(&goredis.FailoverOptions{
		MasterName: testserver.SentinelMaster, SentinelAddrs: addrs(r.Sentinels), Password: "pw",
	})
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	require.NoError(t, c.Set(t.Context(), "k", "v", 0).Err())
	require.NoError(t, r.Nodes[0].Kill())
	within(t, func(ctx context.Context) error { return c.Set(ctx, "k", "w", 0).Err() })
}

func TestEtcdClusterOutlivesANode(t *testing.T) {
	t.Parallel()
	nodes := testserver.EtcdClusterForTest(t, 3, testserver.EtcdConfig{NoFsync: true, TLS: testserver.MutualTLS})
	c, err := clientv3.New(clientv3.Config{Endpoints: urls(nodes), TLS: nodes[1].TLS()})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	db := etcdStore{c}

	for i, s := range nodes {
		v := string(rune('a' + i))
		require.NoError(t, s.Kill())
		within(t, func(ctx context.Context) error { return db.put(ctx, "k", v) })
		require.NoError(t, s.Restart(t.Context()))
		within(t, has(db, "k", v))
	}
}

func TestNATSClusterOutlivesANode(t *testing.T) {
	t.Parallel()
	nodes := testserver.NATSClusterForTest(t, 3, testserver.NATSConfig{User: "u", Password: "p"})
	opts := natsgo.GetDefaultOptions()
	opts.Servers, opts.User, opts.Password = urls(nodes), "u", "p"
	opts.MaxReconnect, opts.ReconnectWait = -1, 10*time.Millisecond
	nc, err := opts.Connect()
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	within(t, func(ctx context.Context) error {
		_, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{Name: natsStream, Subjects: []string{"t.*"}, Replicas: 3})
		return err
	})

	for i, s := range nodes {
		v := []byte{byte('a' + i)}
		require.NoError(t, s.Kill())
		within(t, func(ctx context.Context) error {
			_, err := js.Publish(ctx, "t.k", v)
			return err
		})
		require.NoError(t, s.Restart(t.Context()))
		within(t, has(natsStore{js}, "k", string(v)))
	}
}
