package etcd_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
)

func keys(t testing.TB, c *clientv3.Client, prefix string) (all []string) {
	r, err := c.Get(t.Context(), prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	require.NoError(t, err)
	for _, kv := range r.Kvs {
		all = append(all, string(kv.Key))
	}
	return all
}

func TestRetentionByCount(t *testing.T) {
	for _, keep := range []int{1, 5, 100, 640} {
		t.Run(fmt.Sprint(keep), func(t *testing.T) {
			c := connect(t, server(t).URL())
			b := backend(t, c, etcd.WithRetention(keep, time.Hour))
			slack := max(keep/64, 1)
			for n := 1; n <= 3*keep+5; n++ {
				publish(t, b, "a", "x")
				if n%(keep/3+1) != 0 {
					continue
				}
				have := len(keys(t, c, "dchannel/log/a/"))
				require.GreaterOrEqual(t, have, min(n, keep))
				require.LessOrEqual(t, have, keep+slack)
			}
			readAll(t, b, "a")
		})
	}
}

// TestRetentionKeepsWholeFrames: the last n messages are there, also when a frame holds more.
func TestRetentionKeepsWholeFrames(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()), etcd.WithRetention(10, time.Hour))
	for range 20 {
		_, err := b.Publish(t.Context(), "a", frame("x", 7))
		require.NoError(t, err)
		page := readAll(t, b, "a")
		oldest := page.Entries[0].First()
		require.LessOrEqual(t, oldest, max(page.Head.Seq, 10)-10+1)
	}
	require.LessOrEqual(t, len(readAll(t, b, "a").Entries), 3)
}

func TestEverythingExpires(t *testing.T) {
	c := connect(t, server(t).URL())
	b := backend(t, c, etcd.WithRetention(100, time.Second), etcd.WithIdleExpiry(4*time.Second))
	k := subscribe(t, b, "a")
	began := time.Now()
	last := publish(t, b, "a", "x")
	_, err := b.MarkClosed(t.Context(), "closed", dchannel.NewID(), time.Second)
	require.NoError(t, err)
	gone := func(prefix string) func() bool {
		return func() bool { return len(keys(t, c, prefix)) == 0 }
	}
	require.Eventually(t, gone("dchannel/log/a/"), patience, 20*time.Millisecond)
	require.GreaterOrEqual(t, time.Since(began), time.Second)
	// The position outlives the messages.
	page := readAll(t, b, "a")
	require.Empty(t, page.Entries)
	require.Equal(t, last, page.Head.Position)
	require.Equal(t, last.Seq+1, publish(t, b, "a", "y").Seq)
	require.Eventually(t, gone("dchannel/head/closed"), patience, 20*time.Millisecond)
	require.Eventually(t, gone("dchannel/log/closed"), patience, 20*time.Millisecond)
	t.Log("marker gone after", time.Since(began))
	require.GreaterOrEqual(t, time.Since(began), time.Second)
	pos := publish(t, b, "closed", "opened again")
	require.EqualValues(t, 1, pos.Seq)

	heads, err := b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	was := heads[0].Incarnation
	require.Eventually(t, gone("dchannel/head/"), patience, 20*time.Millisecond)
	// While a process lives, so does the namespace's id.
	heads, err = b.Heads(t.Context(), []string{"a"})
	require.NoError(t, err)
	require.Equal(t, was, heads[0].Incarnation)
	require.Zero(t, heads[0].Position)
	require.Empty(t, k.resyncs)
	fresh := publish(t, b, "a", "z")
	require.EqualValues(t, 1, fresh.Seq)
	require.NotEqual(t, last.Epoch, fresh.Epoch)
	require.NoError(t, b.Close())
	require.Eventually(t, gone(""), patience, 20*time.Millisecond)
	t.Log("all gone after", time.Since(began))
	leases, err := c.Leases(t.Context())
	require.NoError(t, err)
	require.Empty(t, leases.Leases)
}

// TestFewLeases: they are counted by lifetimes in use, not by channels.
func TestFewLeases(t *testing.T) {
	c := connect(t, server(t).URL())
	b := backend(t, c)
	for i := range 300 {
		publish(t, b, fmt.Sprint("a", i), "x")
		_, err := b.MarkClosed(t.Context(), fmt.Sprint("a", i), dchannel.NewID(), time.Hour+time.Duration(i)*time.Second)
		require.NoError(t, err)
	}
	leases, err := c.Leases(t.Context())
	require.NoError(t, err)
	require.LessOrEqual(t, len(leases.Leases), 5)
}

func TestLeasesThatTheServerForgot(t *testing.T) {
	c := connect(t, server(t).URL())
	b := backend(t, c)
	publish(t, b, "a", "x")
	leases, err := c.Leases(t.Context())
	require.NoError(t, err)
	for _, l := range leases.Leases {
		_, err := c.Revoke(t.Context(), l.ID)
		require.NoError(t, err)
	}
	require.EqualValues(t, 1, publish(t, b, "a", "y").Seq) // a new log
	require.Len(t, readAll(t, b, "a").Entries, 1)
}
