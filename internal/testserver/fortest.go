package testserver

import "context"

// TB is the part of [testing.TB] that this package uses; named here, so that
// programs which start servers do not link package testing.
type TB interface {
	Helper()
	Context() context.Context
	Cleanup(f func())
	Failed() bool
	Logf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// RedisForTest is [StartRedis] for a test: the server is closed when the test ends,
// and its log is printed if the test failed. A server that cannot be started fails
// the test; it is never skipped.
func RedisForTest(t TB, cfg RedisConfig) *Server {
	t.Helper()
	s, err := StartRedis(t.Context(), cfg)
	forTest(t, err, s)
	return s
}

// RedisClusterForTest is [StartRedisCluster] for a test.
func RedisClusterForTest(t TB, masters, replicas int, cfg RedisConfig) []*Server {
	t.Helper()
	nodes, err := StartRedisCluster(t.Context(), masters, replicas, cfg)
	forTest(t, err, nodes...)
	return nodes
}

// RedisSentinelForTest is [StartRedisSentinel] for a test.
func RedisSentinelForTest(t TB, replicas, sentinels int, cfg RedisConfig) *RedisSentinel {
	t.Helper()
	r, err := StartRedisSentinel(t.Context(), replicas, sentinels, cfg)
	forTest(t, err)
	forTest(t, nil, append(r.Sentinels, r.Nodes...)...)
	return r
}

// NATSForTest is [StartNATS] for a test, as RedisForTest is StartRedis.
func NATSForTest(t TB, cfg NATSConfig) *Server {
	t.Helper()
	s, err := StartNATS(t.Context(), cfg)
	forTest(t, err, s)
	return s
}

// NATSClusterForTest is [StartNATSCluster] for a test.
func NATSClusterForTest(t TB, n int, cfg NATSConfig) []*Server {
	t.Helper()
	nodes, err := StartNATSCluster(t.Context(), n, cfg)
	forTest(t, err, nodes...)
	return nodes
}

// EtcdForTest is [StartEtcd] for a test, as RedisForTest is StartRedis.
func EtcdForTest(t TB, cfg EtcdConfig) *Server {
	t.Helper()
	s, err := StartEtcd(t.Context(), cfg)
	forTest(t, err, s)
	return s
}

// EtcdClusterForTest is [StartEtcdCluster] for a test.
func EtcdClusterForTest(t TB, n int, cfg EtcdConfig) []*Server {
	t.Helper()
	nodes, err := StartEtcdCluster(t.Context(), n, cfg)
	forTest(t, err, nodes...)
	return nodes
}

func forTest(t TB, err error, nodes ...*Server) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		for _, s := range nodes {
			if t.Failed() {
				t.Logf("%s at %s%s", s.kind.name, s.Addr(), quoteLog(s.Log()))
			}
			if err := s.Close(); err != nil {
				t.Logf("close %s: %v", s.kind.name, err)
			}
		}
	})
}
