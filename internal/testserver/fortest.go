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
	return forTest(t, StartRedis, cfg)
}

// NATSForTest is [StartNATS] for a test, as RedisForTest is StartRedis.
func NATSForTest(t TB, cfg NATSConfig) *Server {
	t.Helper()
	return forTest(t, StartNATS, cfg)
}

// EtcdForTest is [StartEtcd] for a test, as RedisForTest is StartRedis.
func EtcdForTest(t TB, cfg EtcdConfig) *Server {
	t.Helper()
	return forTest(t, StartEtcd, cfg)
}

func forTest[C any](t TB, start func(context.Context, C) (*Server, error), cfg C) *Server {
	t.Helper()
	s, err := start(t.Context(), cfg)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s at %s%s", s.kind.name, s.Addr(), quoteLog(s.Log()))
		}
		if err := s.Close(); err != nil {
			t.Logf("close %s: %v", s.kind.name, err)
		}
	})
	return s
}
