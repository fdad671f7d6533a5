package testserver_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/dchannel/dchannel/internal/testserver"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// store is what the tests below want of a real client.
type store interface {
	put(ctx context.Context, key, value string) error
	get(ctx context.Context, key string) (string, error) // "" when there is none
}

// subject is one kind of server, in a configuration that keeps its data.
type subject struct {
	name  string
	start func(ctx context.Context) (*testserver.Server, error)
	open  func(t *testing.T, s *testserver.Server) store
}

var subjects = []subject{
	{"Redis", func(ctx context.Context) (*testserver.Server, error) {
		return testserver.StartRedis(ctx, testserver.RedisConfig{Persistence: testserver.AOFAlways})
	}, openRedis},
	{"NATS", func(ctx context.Context) (*testserver.Server, error) {
		return testserver.StartNATS(ctx, testserver.NATSConfig{SyncAlways: true})
	}, openNATS},
	{"Etcd", func(ctx context.Context) (*testserver.Server, error) {
		return testserver.StartEtcd(ctx, testserver.EtcdConfig{})
	}, openEtcd},
}

// forEach runs the test against every kind of server, each time a new one.
func forEach(t *testing.T, test func(t *testing.T, s *testserver.Server, db store)) {
	t.Parallel()
	for _, sub := range subjects {
		t.Run(sub.name, func(t *testing.T) {
			t.Parallel()
			s, err := sub.start(t.Context())
			require.NoError(t, err)
			t.Cleanup(func() { assert.NoError(t, s.Close()) })
			test(t, s, sub.open(t, s))
		})
	}
}

// within tries until the client has found its way back to the server.
func within(t *testing.T, try func(ctx context.Context) error) {
	t.Helper()
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		assert.NoError(c, try(ctx))
	}, 30*time.Second, 20*time.Millisecond)
}

func has(db store, key, want string) func(context.Context) error {
	return func(ctx context.Context) error {
		got, err := db.get(ctx, key)
		if err == nil && got != want {
			err = fmt.Errorf("%s is %q, want %q", key, got, want)
		}
		return err
	}
}

func TestKillAndRestartKeepAddressAndData(t *testing.T) {
	forEach(t, func(t *testing.T, s *testserver.Server, db store) {
		addr, first := s.Addr(), s.PID()
		require.NoError(t, db.put(t.Context(), "k", "v"))

		require.NoError(t, s.Kill())
		assert.Zero(t, s.PID())
		assert.Error(t, s.Kill(), "a server that is down cannot be killed")
		_, err := net.Dial("tcp", addr)
		require.ErrorIs(t, err, syscall.ECONNREFUSED)

		require.NoError(t, s.Restart(t.Context()))
		assert.Equal(t, addr, s.Addr())
		assert.NotEqual(t, first, s.PID())
		within(t, has(db, "k", "v"))
	})
}

func TestRestartOfARunningServerStopsItFirst(t *testing.T) {
	forEach(t, func(t *testing.T, s *testserver.Server, db store) {
		require.NoError(t, db.put(t.Context(), "k", "v"))
		first := s.PID()
		require.NoError(t, s.Restart(t.Context()))
		assert.NotEqual(t, first, s.PID())
		within(t, has(db, "k", "v"))
	})
}

func TestWipeLosesTheData(t *testing.T) {
	forEach(t, func(t *testing.T, s *testserver.Server, db store) {
		require.NoError(t, db.put(t.Context(), "k", "v"))
		require.Error(t, s.Wipe(), "a running server has its data open")
		require.NoError(t, s.Stop())
		require.NoError(t, s.Wipe())
		require.NoError(t, s.Restart(t.Context()))
		within(t, has(db, "k", ""))
	})
}

func TestPauseFreezesAndResumeGoesOn(t *testing.T) {
	forEach(t, func(t *testing.T, s *testserver.Server, db store) {
		require.NoError(t, s.Pause())
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		require.Error(t, db.put(ctx, "k", "v"))

		require.NoError(t, s.Resume())
		within(t, func(ctx context.Context) error { return db.put(ctx, "k", "w") })
		within(t, has(db, "k", "w"))
	})
}

func TestStopAndKillEndAPausedServer(t *testing.T) {
	forEach(t, func(t *testing.T, s *testserver.Server, db store) {
		require.NoError(t, s.Pause())
		require.NoError(t, s.Stop())
		require.NoError(t, s.Restart(t.Context()))
		require.NoError(t, s.Pause())
		require.NoError(t, s.Kill())
	})
}

func TestCloseLeavesNoProcessAndNoDirectory(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for _, sub := range subjects {
		t.Run(sub.name, func(t *testing.T) {
			s, err := sub.start(t.Context())
			require.NoError(t, err)
			pid, addr := s.PID(), s.Addr()
			require.NoError(t, s.Close())
			require.NoError(t, s.Close())

			assert.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
			left, err := filepath.Glob(filepath.Join(os.TempDir(), "dchannel-*-*"))
			require.NoError(t, err)
			for _, name := range left {
				assert.Contains(t, name, "dchannel-ports-", "left behind")
			}
			assert.Equal(t, addr, s.Addr())
			assert.Error(t, s.Restart(t.Context()))
			assert.Error(t, s.Kill())
			assert.Error(t, s.Wipe())
		})
	}
}

func TestStartReportsTheServersOwnWords(t *testing.T) {
	t.Parallel()
	_, err := testserver.StartRedis(t.Context(), testserver.RedisConfig{Config: []string{"no-such-directive 1"}})
	assert.ErrorContains(t, err, "no-such-directive")
	_, err = testserver.StartNATS(t.Context(), testserver.NATSConfig{Config: "listen: {"})
	assert.ErrorContains(t, err, "Parse error")
	_, err = testserver.StartEtcd(t.Context(), testserver.EtcdConfig{Args: []string{"--no-such-flag"}})
	assert.ErrorContains(t, err, "no-such-flag")
}

func TestStartObeysItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := testserver.StartRedis(ctx, testserver.RedisConfig{})
	assert.ErrorIs(t, err, context.Canceled)
}

func TestMissingRedisSaysHowToGetIt(t *testing.T) {
	t.Setenv("REDIS_SERVER", "/no/such/redis-server")
	_, err := testserver.StartRedis(t.Context(), testserver.RedisConfig{})
	assert.ErrorContains(t, err, "apt-get install redis-server")
}

// record is a test that fails, without failing the one that runs it.
type record struct {
	*testing.T
	failed   bool
	cleanups []func()
	text     strings.Builder
}

func (r *record) Failed() bool            { return r.failed }
func (r *record) Cleanup(f func())        { r.cleanups = append(r.cleanups, f) }
func (r *record) Logf(f string, a ...any) { fmt.Fprintf(&r.text, f+"\n", a...) }
func (r *record) Fatalf(f string, a ...any) {
	r.failed = true
	panic(fmt.Errorf(f, a...))
}

func TestForTestPrintsTheLogOfAFailedTest(t *testing.T) {
	t.Parallel()
	for _, failed := range []bool{false, true} {
		r := &record{T: t}
		s := testserver.RedisForTest(r, testserver.RedisConfig{})
		pid := s.PID()
		r.failed = failed
		for _, f := range r.cleanups {
			f()
		}
		assert.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
		assert.Equal(t, failed, strings.Contains(r.text.String(), "Ready to accept connections"))
	}
}

func TestForTestFailsRatherThanSkips(t *testing.T) {
	t.Parallel()
	r := &record{T: t}
	assert.Panics(t, func() {
		testserver.RedisForTest(r, testserver.RedisConfig{Config: []string{"no-such-directive 1"}})
	})
	assert.True(t, r.failed)
}
