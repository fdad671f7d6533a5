package testserver_test

import (
	"context"
	"errors"
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

type redisStore struct{ *goredis.Client }

func (r redisStore) put(ctx context.Context, key, value string) error {
	return r.Set(ctx, key, value, 0).Err()
}

func (r redisStore) get(ctx context.Context, key string) (string, error) {
	v, err := r.Get(ctx, key).Result()
	if errors.Is(err, goredis.Nil) {
		return "", nil
	}
	return v, err
}

func openRedis(t *testing.T, s *testserver.Server) store {
	return dialRedis(t, s, func(*goredis.Options) {})
}

func dialRedis(t *testing.T, s *testserver.Server, set func(*goredis.Options)) redisStore {
	// The client gives up in time only if it is told to: see ContextTimeoutEnabled.
	o := &goredis.Options{Addr: s.Addr(), TLSConfig: s.TLS(), ContextTimeoutEnabled: true}
	set(o)
	c := goredis.NewClient(o)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return redisStore{c}
}

// natsStore keeps keys as subjects of a stream of its own.
type natsStore struct{ jetstream.JetStream }

const natsStream = "TEST"

func (n natsStore) put(ctx context.Context, key, value string) error {
	cfg := jetstream.StreamConfig{Name: natsStream, Subjects: []string{"t.*"}, AllowDirect: true}
	if _, err := n.CreateOrUpdateStream(ctx, cfg); err != nil {
		return err
	}
	_, err := n.Publish(ctx, "t."+key, []byte(value))
	return err
}

func (n natsStore) get(ctx context.Context, key string) (string, error) {
	st, err := n.Stream(ctx, natsStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	m, err := st.GetLastMsgForSubject(ctx, "t."+key)
	if err != nil {
		return "", err
	}
	return string(m.Data), nil
}

func openNATS(t *testing.T, s *testserver.Server) store { return dialNATS(t, s) }

func dialNATS(t *testing.T, s *testserver.Server, opts ...natsgo.Option) natsStore {
	if s.TLS() != nil {
		opts = append(opts, natsgo.Secure(s.TLS()))
	}
	opts = append(opts, natsgo.MaxReconnects(-1), natsgo.ReconnectWait(10*time.Millisecond))
	nc, err := natsgo.Connect(s.URL(), opts...)
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	return natsStore{js}
}

type etcdStore struct{ *clientv3.Client }

func (e etcdStore) put(ctx context.Context, key, value string) error {
	_, err := e.Put(ctx, key, value)
	return err
}

func (e etcdStore) get(ctx context.Context, key string) (string, error) {
	r, err := e.Get(ctx, key)
	if err != nil || len(r.Kvs) == 0 {
		return "", err
	}
	return string(r.Kvs[0].Value), nil
}

func openEtcd(t *testing.T, s *testserver.Server) store { return dialEtcd(t, s, s.URL()) }

func dialEtcd(t *testing.T, s *testserver.Server, endpoint string) etcdStore {
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, TLS: s.TLS()})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return etcdStore{c}
}

func TestRedisPasswordAndUsers(t *testing.T) {
	t.Parallel()
	s := testserver.RedisForTest(t, testserver.RedisConfig{
		Password: "s3cret word",
		Users:    []string{"reader on >pw ~* +get +hello +ping"},
	})
	assert.ErrorContains(t, openRedis(t, s).put(t.Context(), "k", "v"), "NOAUTH")
	admin := dialRedis(t, s, func(o *goredis.Options) { o.Password = "s3cret word" })
	require.NoError(t, admin.put(t.Context(), "k", "v"))
	reader := dialRedis(t, s, func(o *goredis.Options) { o.Username, o.Password = "reader", "pw" })
	require.NoError(t, has(reader, "k", "v")(t.Context()))
	assert.ErrorContains(t, reader.put(t.Context(), "k", "v"), "NOPERM")
}

func TestRedisWithoutPersistenceForgets(t *testing.T) {
	t.Parallel()
	s := testserver.RedisForTest(t, testserver.RedisConfig{})
	db := openRedis(t, s)
	require.NoError(t, db.put(t.Context(), "k", "v"))
	require.NoError(t, s.Restart(t.Context()))
	within(t, has(db, "k", ""))
}

func TestRedisMaxMemoryRefusesWrites(t *testing.T) {
	t.Parallel()
	s := testserver.RedisForTest(t, testserver.RedisConfig{MaxMemory: "1"})
	assert.ErrorContains(t, openRedis(t, s).put(t.Context(), "k", "v"), "OOM")
}

func TestRedisTLS(t *testing.T) {
	t.Parallel()
	for _, mode := range []testserver.TLSMode{testserver.ServerTLS, testserver.MutualTLS} {
		s := testserver.RedisForTest(t, testserver.RedisConfig{TLS: mode})
		require.NoError(t, openRedis(t, s).put(t.Context(), "k", "v"))
		plain := dialRedis(t, s, func(o *goredis.Options) { o.TLSConfig = nil })
		assert.Error(t, plain.put(t.Context(), "k", "v"))
		if mode == testserver.MutualTLS {
			anonymous := dialRedis(t, s, func(o *goredis.Options) { o.TLSConfig.Certificates = nil })
			assert.Error(t, anonymous.put(t.Context(), "k", "v"))
		}
	}
}

func TestNATSPasswordAndPermissions(t *testing.T) {
	t.Parallel()
	s := testserver.NATSForTest(t, testserver.NATSConfig{User: "u", Password: "p"})
	_, err := natsgo.Connect(s.URL())
	require.ErrorIs(t, err, natsgo.ErrAuthorization)
	require.NoError(t, dialNATS(t, s, natsgo.UserInfo("u", "p")).put(t.Context(), "k", "v"))

	s = testserver.NATSForTest(t, testserver.NATSConfig{Config: `
		accounts { A { jetstream: enabled, users: [
			{ user: admin, password: p },
			{ user: guest, password: p, permissions: { publish: { deny: "$JS.API.STREAM.CREATE.>" } } } ] } }`})
	require.NoError(t, dialNATS(t, s, natsgo.UserInfo("admin", "p")).put(t.Context(), "k", "v"))
	quiet := natsgo.ErrorHandler(func(*natsgo.Conn, *natsgo.Subscription, error) {})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err = dialNATS(t, s, natsgo.UserInfo("guest", "p"), quiet).
		CreateStream(ctx, jetstream.StreamConfig{Name: "OTHER"})
	assert.Error(t, err)
}

func TestNATSWithoutJetStream(t *testing.T) {
	t.Parallel()
	s := testserver.NATSForTest(t, testserver.NATSConfig{NoJetStream: true})
	_, err := dialNATS(t, s).AccountInfo(t.Context())
	assert.ErrorIs(t, err, jetstream.ErrJetStreamNotEnabled)
}

func TestNATSTLS(t *testing.T) {
	t.Parallel()
	for _, mode := range []testserver.TLSMode{testserver.ServerTLS, testserver.MutualTLS} {
		s := testserver.NATSForTest(t, testserver.NATSConfig{TLS: mode})
		require.NoError(t, dialNATS(t, s).put(t.Context(), "k", "v"))
		_, err := natsgo.Connect(s.URL())
		assert.Error(t, err, "without our CA")
		ca, cert, key := s.TLSFiles()
		nc, err := natsgo.Connect(s.URL(), natsgo.RootCAs(ca), natsgo.ClientCert(cert, key))
		require.NoError(t, err)
		nc.Close()
		if mode == testserver.MutualTLS {
			_, err = natsgo.Connect(s.URL(), natsgo.RootCAs(ca))
			assert.Error(t, err)
		}
	}
}

func TestEtcdTLS(t *testing.T) {
	t.Parallel()
	for _, mode := range []testserver.TLSMode{testserver.ServerTLS, testserver.MutualTLS} {
		s := testserver.EtcdForTest(t, testserver.EtcdConfig{NoFsync: true, TLS: mode})
		require.NoError(t, openEtcd(t, s).put(t.Context(), "k", "v"))
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		plain := dialEtcd(t, s, "http://"+s.Addr())
		assert.Error(t, plain.put(ctx, "k", "v"))
		cancel()
	}
}

func TestEtcdArgs(t *testing.T) {
	t.Parallel()
	s := testserver.EtcdForTest(t, testserver.EtcdConfig{NoFsync: true, Args: []string{"--max-request-bytes=1000"}})
	assert.ErrorContains(t, openEtcd(t, s).put(t.Context(), "k", string(make([]byte, 5000))), "too large")
}
