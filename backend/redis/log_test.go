package redis_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/redis"
	"github.com/dchannel/dchannel/internal/testserver"
)

func TestLog(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	b := f.backend()
	ctx := ctxFor(t)

	t.Run("entries chain and come back unchanged", func(t *testing.T) {
		binary := []byte("a\n\x00\xff b")
		first := dchannel.Frame{ID: dchannel.NewID(), Count: 3, Data: bytes.Clone(binary)}
		second := dchannel.Frame{ID: dchannel.NewID(), Count: 2, Data: []byte{}}
		p1, err := b.Publish(ctx, "chain", first)
		require.NoError(t, err)
		require.EqualValues(t, 3, p1.Seq)
		p2, err := b.Publish(ctx, "chain", second)
		require.NoError(t, err)
		require.Equal(t, dchannel.Position{Epoch: p1.Epoch, Seq: 5}, p2)

		page := read(t, b, "chain", dchannel.Position{})
		require.Len(t, page.Entries, 2)
		e1, e2 := page.Entries[0], page.Entries[1]
		require.Equal(t, first.ID, e1.ID)
		require.Equal(t, dchannel.ID{}, e1.Prev)
		require.Equal(t, binary, e1.Data)
		require.Equal(t, first.ID, e2.Prev)
		require.Equal(t, p2, e2.Position)
		require.Equal(t, 2, e2.Count)
		require.Empty(t, e2.Data)
		require.WithinDuration(t, time.Now(), time.UnixMilli(e2.Time), time.Minute)
		require.Equal(t, p2, page.Head.Position)
		require.Equal(t, second.ID, page.Head.ID)
		require.False(t, page.Head.Closed)
		require.NotZero(t, page.Head.Incarnation)
		require.Equal(t, page.Head, head(t, b, "chain"))

		require.Len(t, read(t, b, "chain", p1).Entries, 1)
		require.Len(t, read(t, b, "chain", dchannel.Position{Epoch: p1.Epoch, Seq: 2}).Entries, 2, "inside a frame")
		require.Empty(t, read(t, b, "chain", p2).Entries)
		require.Len(t, read(t, b, "chain", dchannel.Position{Epoch: 1, Seq: 9}).Entries, 2, "an older epoch")
		require.Len(t, read(t, b, "chain", dchannel.Position{Epoch: p1.Epoch * 2, Seq: 9}).Entries, 2, "a later epoch")
	})

	t.Run("a read stops at its limit", func(t *testing.T) {
		var last dchannel.Position
		for i := range 300 {
			last = publish(t, b, "limit", fmt.Sprintf("%010d", i))
		}
		for _, c := range []struct{ limit, want int }{{0, 1}, {1, 1}, {10, 1}, {29, 2}, {30, 3}, {170, 17}, {2000, 200}, {1 << 20, 300}} {
			page, err := b.Read(ctx, "limit", dchannel.Position{}, c.limit)
			require.NoError(t, err)
			require.Len(t, page.Entries, c.want, "limit %d", c.limit)
			require.Equal(t, last, page.Head.Position)
			for i, e := range page.Entries {
				require.EqualValues(t, i+1, e.Seq)
			}
		}
	})

	t.Run("close", func(t *testing.T) {
		last := publish(t, b, "close", "x")
		id := dchannel.NewID()
		pos, err := b.MarkClosed(ctx, "close", id, time.Hour)
		require.NoError(t, err)
		require.Equal(t, dchannel.Position{Epoch: last.Epoch, Seq: 2}, pos)
		again, err := b.MarkClosed(ctx, "close", dchannel.NewID(), time.Second)
		require.NoError(t, err)
		require.Equal(t, pos, again)
		_, err = b.Publish(ctx, "close", frame("late"))
		require.ErrorIs(t, err, dchannel.ErrChanClosed)
		page := read(t, b, "close", last)
		require.Len(t, page.Entries, 1)
		require.True(t, page.Entries[0].Closed)
		require.Nil(t, page.Entries[0].Data)
		require.Equal(t, id, page.Entries[0].ID)
		require.True(t, page.Head.Closed)

		empty, err := b.MarkClosed(ctx, "close an empty one", id, time.Hour)
		require.NoError(t, err)
		require.EqualValues(t, 1, empty.Seq)
		for _, key := range []string{"{dchannel/0}:m:close", "{dchannel/0}:s:close"} {
			ttl, err := f.admin.PTTL(ctx, key).Result()
			require.NoError(t, err)
			require.InDelta(t, time.Hour, ttl, float64(time.Minute), key)
		}
	})

	t.Run("the marker outlives the retention and then goes", func(t *testing.T) {
		b := f.backend(redis.WithNamespace("short"), redis.WithRetention(10, time.Millisecond), redis.WithIdleExpiry(time.Millisecond))
		_, err := b.MarkClosed(ctx, "c", dchannel.NewID(), 0)
		require.NoError(t, err)
		began := time.Now()
		eventually(t, "the log is gone", func() bool { return head(t, b, "c").Seq == 0 })
		require.Greater(t, time.Since(began), 700*time.Millisecond)
		publish(t, b, "c", "a new log")
	})

	t.Run("remove begins a new log", func(t *testing.T) {
		old := publish(t, b, "remove", "x")
		memory := head(t, b, "remove").Incarnation
		require.NoError(t, b.Remove(ctx, "remove"))
		require.NoError(t, b.Remove(ctx, "remove"))
		require.Zero(t, head(t, b, "remove").Position)
		require.Equal(t, memory, head(t, b, "remove").Incarnation)
		next := publish(t, b, "remove", "y")
		require.EqualValues(t, 1, next.Seq)
		require.Greater(t, next.Epoch, old.Epoch)
		require.Equal(t, []string{"y"}, texts(read(t, b, "remove", old).Entries))
	})

	t.Run("names stay apart", func(t *testing.T) {
		names := []string{"a", "a.b", "a b", "*", ">", "{x}", "}{", "{}", ":", "s:a", "日本語", "a:", "?", "[a]", strings.Repeat("n", 255)}
		for _, n := range names {
			publish(t, b, "apart "+n, n)
		}
		for _, n := range names {
			require.Equal(t, []string{n}, texts(read(t, b, "apart "+n, dchannel.Position{}).Entries))
		}
		other := f.backend(redis.WithNamespace("dchannel/0"))
		require.Empty(t, read(t, other, "apart a", dchannel.Position{}).Entries)
	})

	t.Run("heads", func(t *testing.T) {
		names := make([]string, 2500)
		for i := range names {
			names[i] = fmt.Sprint("heads ", i)
		}
		p := publish(t, b, names[1500], "x")
		heads, err := b.Heads(ctx, names)
		require.NoError(t, err)
		for i, h := range heads {
			require.NotZero(t, h.Incarnation)
			require.Equal(t, h.Seq != 0, i == 1500)
		}
		require.Equal(t, p, heads[1500].Position)
		none, err := b.Heads(ctx, nil)
		require.NoError(t, err)
		require.Empty(t, none)
	})

	t.Run("foreign data is skipped", func(t *testing.T) {
		p := publish(t, b, "foreign", "one")
		key := "{dchannel/0}:s:foreign"
		id := fmt.Sprintf("%d-%d", p.Epoch, 2)
		require.NoError(t, f.admin.Do(ctx, "XADD", key, id, "h", "junk", "d", "").Err())
		require.NoError(t, f.admin.Do(ctx, "XADD", key, fmt.Sprintf("%d-%d", p.Epoch, 3), "x", "y", "z", "").Err())
		page := read(t, b, "foreign", dchannel.Position{})
		require.Equal(t, []string{"one"}, texts(page.Entries))
		require.Empty(t, read(t, b, "foreign", p).Entries)
		_, err := b.Publish(ctx, "foreign", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrRefused) // its place is taken

		require.NoError(t, f.admin.Set(ctx, "{dchannel/0}:m:foreign", "junk", 0).Err())
		require.Zero(t, head(t, b, "foreign").Position)
		_, err = b.Publish(ctx, "foreign", frame("x"))
		require.ErrorIs(t, err, dchannel.ErrRefused)
		require.NoError(t, b.Remove(ctx, "foreign"))

		require.NoError(t, f.admin.RPush(ctx, "{dchannel/0}:s:foreign", "a list").Err())
		_, err = b.Read(ctx, "foreign", p, 1)
		require.ErrorIs(t, err, dchannel.ErrRefused)
		require.NoError(t, b.Remove(ctx, "foreign"))
	})

	t.Run("the server forgets its scripts", func(t *testing.T) {
		require.NoError(t, f.admin.ScriptFlush(ctx).Err())
		publish(t, b, "scripts", "x")
		require.NoError(t, f.admin.ScriptFlush(ctx).Err())
		require.EqualValues(t, 1, head(t, b, "scripts").Seq)
	})

	t.Run("every key has a time to live", func(t *testing.T) {
		keys, err := f.admin.Keys(ctx, "*").Result()
		require.NoError(t, err)
		require.Greater(t, len(keys), 20)
		for _, k := range keys {
			ttl, err := f.admin.PTTL(ctx, k).Result()
			require.NoError(t, err)
			require.NotEqual(t, time.Duration(-1), ttl, k)
		}
	})
}

func TestRetention(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	ctx := ctxFor(t)

	t.Run("by number", func(t *testing.T) {
		b := f.backend(redis.WithRetention(50, time.Minute))
		for range 1000 {
			publish(t, b, "c", "x")
		}
		page := read(t, b, "c", dchannel.Position{})
		require.GreaterOrEqual(t, len(page.Entries), 50)
		require.Less(t, len(page.Entries), 50+101, "Redis trims whole nodes of 100")
		require.EqualValues(t, 1000, page.Entries[len(page.Entries)-1].Seq)
	})

	t.Run("by time, and the head outlives it", func(t *testing.T) {
		b := f.backend(redis.WithRetention(50, 30*time.Millisecond))
		p := publish(t, b, "t", "x")
		eventually(t, "messages are gone", func() bool { return len(read(t, b, "t", dchannel.Position{}).Entries) == 0 })
		require.Equal(t, p, head(t, b, "t").Position)
		next := publish(t, b, "t", "y")
		require.Equal(t, dchannel.Position{Epoch: p.Epoch, Seq: 2}, next)
		require.Equal(t, head(t, b, "t").ID, read(t, b, "t", p).Entries[0].ID)
	})

	t.Run("idle channels leave nothing", func(t *testing.T) {
		require.NoError(t, f.admin.FlushAll(ctx).Err())
		b := f.backend(redis.WithRetention(50, 10*time.Millisecond), redis.WithIdleExpiry(20*time.Millisecond))
		publish(t, b, "idle", "x")
		eventually(t, "no keys", func() bool {
			n, err := f.admin.DBSize(ctx).Result()
			return err == nil && n == 0
		})
	})

	t.Run("the incarnation outlives the heads", func(t *testing.T) {
		b := f.backend(redis.WithNamespace("outlives"), redis.WithRetention(50, 10*time.Millisecond), redis.WithIdleExpiry(400*time.Millisecond))
		memory := head(t, b, "c").Incarnation
		every := time.NewTicker(20 * time.Millisecond)
		defer every.Stop()
		for range 75 {
			<-every.C
			publish(t, b, "c", "x")
		}
		require.Equal(t, memory, head(t, b, "c").Incarnation)
		_, err := b.MarkClosed(ctx, "c", dchannel.NewID(), time.Hour)
		require.NoError(t, err)
		ttl, err := f.admin.PTTL(ctx, "{outlives/0}:i").Result()
		require.NoError(t, err)
		require.Greater(t, ttl, 59*time.Minute)
	})
}

func TestAppendsOfManyBackendsAreOneChain(t *testing.T) {
	f := newFixture(t, testserver.RedisConfig{})
	const backends, frames = 8, 200
	sink, _ := subscribe(t, f.backend(), "c")
	var wg sync.WaitGroup
	for i := range backends {
		b := f.backend()
		wg.Go(func() {
			for j := range frames {
				fr := dchannel.Frame{ID: dchannel.NewID(), Count: 1 + (i+j)%3, Data: fmt.Append(nil, i, ".", j)}
				if _, err := b.Publish(context.Background(), "c", fr); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	page := read(t, f.backend(), "c", dchannel.Position{})
	require.Len(t, page.Entries, backends*frames)
	var prev dchannel.Entry
	next := make([]int, backends)
	for _, e := range page.Entries {
		require.Equal(t, prev.Seq+1, e.First())
		require.Equal(t, prev.ID, e.Prev)
		prev = e
		var i, j int
		_, err := fmt.Sscanf(string(e.Data), "%d.%d", &i, &j)
		require.NoError(t, err)
		require.Equal(t, next[i], j, "each publisher's own order")
		next[i]++
	}
	eventually(t, "all pushed", func() bool { return len(sink.texts()) == backends*frames })
	sink.mu.Lock()
	require.Equal(t, page.Entries, sink.entries)
	sink.mu.Unlock()
}
