package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/faultproxy"
)

// The reply to each write is lost; the write is repeated.
func TestLockRepliesAreLost(t *testing.T) {
	s := server(t)
	proxy, err := faultproxy.New(s.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	b, direct := backend(t, connect(t, proxy.Addr())), connect(t, s.URL())
	a, z := dchannel.NewID(), dchannel.NewID()
	var fence uint64
	for _, c := range []struct {
		what, needle, done string // what the write contains, and what the record does afterwards
		call               func() (dchannel.LockState, error)
		want               func(dchannel.LockState) bool
	}{
		{
			"acquire", `"token":"` + a.String(), `"token":"` + a.String(),
			func() (dchannel.LockState, error) {
				return b.Acquire(t.Context(), "a", dchannel.Lease{Token: a, TTL: hour})
			},
			func(s dchannel.LockState) bool { fence = s.Fence; return s.Held && s.Mine && len(s.Ended) == 0 },
		},
		{
			"extend", `"asked":7200`, `"asked":7200`,
			func() (dchannel.LockState, error) { return b.Extend(t.Context(), "a", a, 2*hour) },
			func(s dchannel.LockState) bool { return s.Held && s.Mine && s.TTL == 2*hour },
		},
		{
			"release", `"released"`, `"released"`,
			func() (dchannel.LockState, error) { return b.Release(t.Context(), "a", a) },
			func(s dchannel.LockState) bool { return !s.Held && s.Mine && len(s.Ended) == 1 && s.Fence == fence },
		},
		{
			"acquire again", `"token":"` + z.String(), `"token":"` + z.String(),
			func() (dchannel.LockState, error) {
				return b.Acquire(t.Context(), "a", dchannel.Lease{Token: z, TTL: hour})
			},
			func(s dchannel.LockState) bool { fence = s.Fence; return s.Held && s.Mine && len(s.Ended) == 1 },
		},
		{
			"force", `"forced"`, `"forced"`,
			func() (dchannel.LockState, error) { return b.EndLock(t.Context(), "a", fence, dchannel.LockForced) },
			func(s dchannel.LockState) bool {
				return !s.Held && ends(s, dchannel.LockForced, dchannel.LockReleased) && len(s.Ended) == 2
			},
		},
	} {
		sprung := proxy.CutBeforeReplyFunc([]byte(c.needle), func([]byte) bool {
			r, err := direct.Get(context.Background(), "dchannel/lock/a/record")
			return err == nil && len(r.Kvs) == 1 && strings.Contains(string(r.Kvs[0].Value), c.done)
		})
		_, err := c.call()
		require.ErrorIs(t, err, dchannel.ErrUncertain, c.what)
		<-sprung
		for range 2 {
			s, err := c.call()
			require.NoError(t, err, c.what)
			require.True(t, c.want(s), "%s: %+v", c.what, s)
		}
	}
}

func TestWatchLock(t *testing.T) {
	s := server(t)
	proxy, err := faultproxy.New(s.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	b, other := backend(t, connect(t, proxy.Addr())), backend(t, connect(t, s.URL()))
	hints := make(chan struct{}, 1)
	w, err := b.WatchLock(t.Context(), "a", hinted(hints))
	require.NoError(t, err)
	await := func(what string) {
		t.Helper()
		select {
		case <-hints:
		case <-time.After(patience):
			require.FailNow(t, "no hint: "+what)
		}
	}
	quiet := func() { // everything before a push on the same watch has come
		k := subscribe(t, b, "sentinel")
		publish(t, other, "sentinel", "x")
		k.await(t, "sentinel", k.count(1))
		select {
		case <-hints:
		default:
		}
	}
	token := dchannel.NewID()
	first := acquire(t, other, "a", token, hour)
	await("acquire")
	quiet()
	_, err = other.Release(t.Context(), "a", token)
	require.NoError(t, err)
	await("release")
	quiet()
	acquire(t, other, "a", dchannel.NewID(), hour)
	await("acquire")
	quiet()
	_, err = other.EndLock(t.Context(), "a", 0, dchannel.LockForced)
	require.NoError(t, err)
	await("force")
	quiet()
	// Expiry is told by the server.
	acquire(t, other, "a", dchannel.NewID(), 2*time.Second)
	await("acquire")
	quiet()
	await("expiry")
	require.False(t, lockState(t, b, "a").Held)
	// What happened during a cut.
	quiet()
	require.NoError(t, proxy.Refuse(true))
	proxy.Cut()
	token = dchannel.NewID()
	require.Greater(t, acquire(t, other, "a", token, hour).Fence, first.Fence)
	require.NoError(t, proxy.Heal())
	await("after a cut")
	require.True(t, lockState(t, b, "a").Held)
	// Other locks, a publish to the channel, and what comes after the end of the watch are no hints.
	quiet()
	acquire(t, other, "b", dchannel.NewID(), hour)
	publish(t, other, "a", "x")
	w.Close()
	_, err = other.Release(t.Context(), "a", token)
	require.NoError(t, err)
	k := subscribe(t, b, "sentinel")
	publish(t, other, "sentinel", "x")
	k.await(t, "sentinel", k.count(1))
	require.Empty(t, hints)
	// The end of all is told.
	_, err = b.WatchLock(t.Context(), "a", hinted(hints))
	require.NoError(t, err)
	require.NoError(t, b.Close())
	await("close")
	_, err = b.WatchLock(t.Context(), "a", hinted(hints))
	require.ErrorIs(t, err, dchannel.ErrBackendClosed)
}

// The store is lost under a watch: that is a hint, too.
func TestWatchLockOverAWipe(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	token := dchannel.NewID()
	acquire(t, b, "a", token, hour)
	hints := make(chan struct{}, 1)
	w, err := b.WatchLock(t.Context(), "a", hinted(hints))
	require.NoError(t, err)
	defer w.Close()
	require.NoError(t, s.Kill())
	require.NoError(t, s.Wipe())
	require.NoError(t, s.Restart(t.Context()))
	select {
	case <-hints:
	case <-time.After(patience):
		require.FailNow(t, "no hint")
	}
	require.Zero(t, lockState(t, b, "a"))
}

// Everything is under a lease, and what was given back leaves no lease behind.
func TestLocksLeaveNothing(t *testing.T) {
	client := connect(t, server(t).URL())
	b := backend(t, client)
	for i := range 50 {
		a, z := dchannel.NewID(), dchannel.NewID()
		name := fmt.Sprint(i % 5)
		require.True(t, acquire(t, b, name, a, hour).Mine)
		_, err := b.Extend(t.Context(), name, a, 2*hour)
		require.NoError(t, err)
		lineUp(t, b, name, z, hour)
		for _, token := range []dchannel.ID{a, z} {
			_, err = b.Release(t.Context(), name, token)
			require.NoError(t, err)
		}
	}
	acquire(t, b, "held", dchannel.NewID(), hour)
	keys, err := client.Get(t.Context(), "dchannel/", clientv3.WithPrefix())
	require.NoError(t, err)
	require.Len(t, keys.Kvs, 1+5+2)
	for _, kv := range keys.Kvs {
		require.NotZero(t, kv.Lease, string(kv.Key))
		ttl, err := client.TimeToLive(t.Context(), clientv3.LeaseID(kv.Lease))
		require.NoError(t, err)
		if strings.HasSuffix(string(kv.Key), "/record") {
			require.Greater(t, ttl.TTL, int64(24*60*60))
		}
	}
	require.Eventually(t, func() bool {
		leases, err := client.Leases(t.Context())
		return err == nil && len(leases.Leases) <= 4 // the id's, the records' (two lengths) and the one that is held
	}, patience, 10*time.Millisecond)
}

// The permission in the package's documentation is enough for locks.
func TestLockPermissions(t *testing.T) {
	url := server(t).URL()
	root := connect(t, url)
	ctx := t.Context()
	_, err := root.UserAdd(ctx, "root", "secret")
	require.NoError(t, err)
	_, err = root.RoleAdd(ctx, "root")
	require.NoError(t, err)
	_, err = root.UserGrantRole(ctx, "root", "root")
	require.NoError(t, err)
	for user, how := range map[string]clientv3.PermissionType{
		"app":    clientv3.PermissionType(clientv3.PermReadWrite),
		"reader": clientv3.PermissionType(clientv3.PermRead),
	} {
		_, err = root.UserAdd(ctx, user, "secret")
		require.NoError(t, err)
		_, err = root.RoleAdd(ctx, user)
		require.NoError(t, err)
		_, err = root.RoleGrantPermission(ctx, user, "dchannel/", clientv3.GetPrefixRangeEnd("dchannel/"), how)
		require.NoError(t, err)
		_, err = root.UserGrantRole(ctx, user, user)
		require.NoError(t, err)
	}
	_, err = root.AuthEnable(ctx)
	require.NoError(t, err)
	as := func(user string) *etcd.Backend {
		c, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, Username: user, Password: "secret"})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, c.Close()) })
		return backend(t, c)
	}
	b := as("app")
	hints := make(chan struct{}, 1)
	w, err := b.WatchLock(ctx, "a", hinted(hints))
	require.NoError(t, err)
	defer w.Close()
	token, next := dchannel.NewID(), dchannel.NewID()
	require.True(t, acquire(t, b, "a", token, hour).Mine)
	<-hints
	for _, ttl := range []time.Duration{hour, 2 * hour} {
		s, err := b.Extend(ctx, "a", token, ttl)
		require.NoError(t, err)
		require.Equal(t, ttl, s.Remaining)
	}
	lineUp(t, b, "a", next, hour)
	lineUp(t, b, "a", next, hour)
	_, err = b.Release(ctx, "a", token)
	require.NoError(t, err)
	require.True(t, lockState(t, b, "a").Held)

	reader := as("reader")
	require.True(t, lockState(t, reader, "a").Held)
	_, err = reader.EndLock(ctx, "a", 0, dchannel.LockForced)
	require.ErrorIs(t, err, dchannel.ErrRefused)
	require.NotContains(t, err.Error(), "secret")
	_, err = b.EndLock(ctx, "a", 0, dchannel.LockForced)
	require.NoError(t, err)
	_, err = reader.Acquire(ctx, "a", dchannel.Lease{Token: dchannel.NewID(), TTL: hour})
	require.ErrorIs(t, err, dchannel.ErrRefused)
}

func TestLockCallsEndWithTheirContext(t *testing.T) {
	s := server(t)
	b := backend(t, connect(t, s.URL()))
	token := dchannel.NewID()
	acquire(t, b, "a", token, hour)
	require.NoError(t, s.Pause())
	defer s.Resume() //nolint:errcheck // the server ends with the test
	for name, call := range lockCalls(b, token) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		start := time.Now()
		err := call(ctx)
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded, name)
		require.Less(t, time.Since(start), 150*time.Millisecond, name)
	}
	require.NoError(t, b.Close())
	for name, call := range lockCalls(b, token) {
		require.ErrorIs(t, call(t.Context()), dchannel.ErrBackendClosed, name)
	}
}

func lockCalls(b *etcd.Backend, token dchannel.ID) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"acquire": func(ctx context.Context) error {
			_, err := b.Acquire(ctx, "a", dchannel.Lease{Token: token, TTL: hour})
			return err
		},
		"extend":  func(ctx context.Context) error { _, err := b.Extend(ctx, "a", token, hour); return err },
		"release": func(ctx context.Context) error { _, err := b.Release(ctx, "a", token); return err },
		"end": func(ctx context.Context) error {
			_, err := b.EndLock(ctx, "a", 0, dchannel.LockForced)
			return err
		},
		"state": func(ctx context.Context) error { _, err := b.LockState(ctx, "a"); return err },
		"watch": func(ctx context.Context) error { _, err := b.WatchLock(ctx, "a", func() {}); return err },
	}
}

// What a cut leaves uncertain, the release by the same token undoes.
func TestLockUnderCuts(t *testing.T) {
	s := server(t)
	proxy, err := faultproxy.New(s.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	b := backend(t, connect(t, proxy.Addr()))
	ctx, stop := context.WithCancel(t.Context())
	cuts := make(chan struct{})
	go func() {
		defer close(cuts)
		for ctx.Err() == nil {
			select {
			case <-time.After(rand.N(40 * time.Millisecond)):
				proxy.Cut()
			case <-ctx.Done():
			}
		}
	}()
	failed := 0
	insist := func(call func() (dchannel.LockState, error)) dchannel.LockState {
		for {
			s, err := call()
			if err == nil {
				return s
			}
			failed++
			require.True(t, errors.Is(err, dchannel.ErrUncertain) || errors.Is(err, dchannel.ErrUnavailable), "%v", err)
		}
	}
	var last uint64
	for range 100 {
		token := dchannel.NewID()
		s := insist(func() (dchannel.LockState, error) {
			return b.Acquire(t.Context(), "a", dchannel.Lease{Token: token, TTL: hour})
		})
		require.True(t, s.Held && s.Mine && s.Fence > last, "%+v", s)
		last = s.Fence
		s = insist(func() (dchannel.LockState, error) { return b.Release(t.Context(), "a", token) })
		require.True(t, !s.Held && s.Mine && ends(s, dchannel.LockReleased), "%+v", s)
	}
	stop()
	<-cuts
	t.Logf("%d calls failed over %d cuts", failed, proxy.Cuts())
}
