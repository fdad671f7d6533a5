package memory_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// TestContract takes the sentences of dchannel.Backend one by one.
func TestContract(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for _, c := range []struct {
		rule string
		run  func(t *testing.T, b *memory.Backend)
	}{
		{"Numbers are contiguous and begin at 1; a frame takes Count of them; entries are linked by Prev", func(t *testing.T, b *memory.Backend) {
			one, three := frame("one"), frame("three")
			three.Count = 3
			require.EqualValues(t, 1, publish(t, b, "c", one).Seq)
			pos := publish(t, b, "c", three)
			require.EqualValues(t, 4, pos.Seq)
			closed, err := b.MarkClosed(ctx, "c", dchannel.ID{9}, time.Second)
			require.NoError(t, err)
			require.Equal(t, dchannel.Position{Epoch: pos.Epoch, Seq: 5}, closed)
			page := readAll(t, b, "c")
			require.Len(t, page.Entries, 3)
			prev := dchannel.ID{}
			for i, first := range []uint64{1, 2, 5} {
				e := page.Entries[i]
				require.Equal(t, first, e.First())
				require.Equal(t, prev, e.Prev)
				require.InDelta(t, time.Now().UnixMilli(), e.Time, 10_000)
				prev = e.ID
			}
			require.True(t, page.Entries[2].Closed)
			require.Nil(t, page.Entries[2].Data)
			require.Equal(t, dchannel.Position{Epoch: pos.Epoch, Seq: 5}, page.Head.Position)
			require.Equal(t, dchannel.ID{9}, page.Head.ID)
			require.True(t, page.Head.Closed)
			require.Equal(t, time.Second, page.Head.Keep)
		}},
		{"Epochs of one channel never repeat, and grow", func(t *testing.T, b *memory.Backend) {
			last := uint64(0)
			for range 100 {
				pos := publish(t, b, "c", frame(""))
				require.EqualValues(t, 1, pos.Seq)
				require.Greater(t, pos.Epoch, last)
				last = pos.Epoch
				require.NoError(t, b.Remove(ctx, "c"))
			}
		}},
		{"A retry finds the earlier append", func(t *testing.T, b *memory.Backend) {
			f := frame("once")
			pos := publish(t, b, "c", f)
			publish(t, b, "c", frame("later"))
			f.Age = time.Second
			require.Equal(t, pos, publish(t, b, "c", f))
			require.Len(t, readAll(t, b, "c").Entries, 2)
		}},
		{"A retry of what surely never happened is appended", func(t *testing.T, b *memory.Backend) {
			f := frame("new")
			f.Age = time.Hour
			require.EqualValues(t, 1, publish(t, b, "c", f).Seq)
			f = frame("new too")
			f.Age = time.Hour
			require.EqualValues(t, 2, publish(t, b, "c", f).Seq)
		}},
		{"A retry whose entry may have been removed is uncertain", func(t *testing.T, b *memory.Backend) {
			f := frame("gone")
			publish(t, b, "c", f)
			require.NoError(t, b.Remove(ctx, "c"))
			f.Age = time.Second
			_, err := b.Publish(ctx, "c", f)
			require.ErrorIs(t, err, dchannel.ErrUncertain)
			publish(t, b, "c", frame("in the next log"))
			_, err = b.Publish(ctx, "c", f)
			require.ErrorIs(t, err, dchannel.ErrUncertain)
			f = frame("elsewhere")
			f.Age = time.Second
			publish(t, b, "d", f)
		}},
		{"After the close nothing is appended, but a retry of what is below the marker succeeds", func(t *testing.T, b *memory.Backend) {
			f := frame("before")
			pos := publish(t, b, "c", f)
			_, err := b.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
			require.NoError(t, err)
			_, err = b.Publish(ctx, "c", frame("after"))
			require.ErrorIs(t, err, dchannel.ErrChanClosed)
			_, ok, err := b.PublishNow("c", frame("after"))
			require.True(t, ok)
			require.ErrorIs(t, err, dchannel.ErrChanClosed)
			f.Age = time.Second
			require.Equal(t, pos, publish(t, b, "c", f))
			f = frame("a retry that never came through")
			f.Age = time.Second
			_, err = b.Publish(ctx, "c", f)
			require.ErrorIs(t, err, dchannel.ErrChanClosed)
		}},
		{"Closing again leaves the log as it is", func(t *testing.T, b *memory.Backend) {
			first, err := b.MarkClosed(ctx, "c", dchannel.ID{1}, time.Minute)
			require.NoError(t, err)
			again, err := b.MarkClosed(ctx, "c", dchannel.ID{2}, time.Hour)
			require.NoError(t, err)
			require.Equal(t, first, again)
			require.EqualValues(t, 1, again.Seq)
			require.Equal(t, dchannel.ID{1}, readAll(t, b, "c").Head.ID)
		}},
		{"Read begins behind the position, inside a frame too, and stops at the limit", func(t *testing.T, b *memory.Backend) {
			f := frame("aaaa")
			f.Count = 4
			pos := publish(t, b, "c", f)
			publish(t, b, "c", frame("bbbb"))
			publish(t, b, "c", frame("cccc"))
			for _, r := range []struct {
				after uint64
				limit int
				want  []string
			}{
				{0, 100, []string{"aaaa", "bbbb", "cccc"}},
				{3, 100, []string{"aaaa", "bbbb", "cccc"}},
				{4, 100, []string{"bbbb", "cccc"}},
				{0, 8, []string{"aaaa", "bbbb"}},
				{0, 7, []string{"aaaa"}},
				{4, 1, []string{"bbbb"}},
				{4, 0, []string{"bbbb"}},
				{6, 100, []string{}},
				{99, 100, []string{}},
			} {
				page, err := b.Read(ctx, "c", dchannel.Position{Epoch: pos.Epoch, Seq: r.after}, r.limit)
				require.NoError(t, err)
				require.Equal(t, r.want, texts(page.Entries), "after %d, limit %d", r.after, r.limit)
				require.EqualValues(t, 6, page.Head.Seq)
			}
			page, err := b.Read(ctx, "c", dchannel.Position{Epoch: pos.Epoch - 1, Seq: 5}, 100)
			require.NoError(t, err)
			require.Len(t, page.Entries, 3, "of another epoch: from the oldest")
		}},
		{"Heads come in the order asked for, with the incarnation where there is no log; none is a ping", func(t *testing.T, b *memory.Backend) {
			x, y := publish(t, b, "x", frame("")), publish(t, b, "y", frame(""))
			heads, err := b.Heads(ctx, []string{"y", "none", "x"})
			require.NoError(t, err)
			require.Equal(t, y, heads[0].Position)
			require.Zero(t, heads[1].Position)
			require.Equal(t, x, heads[2].Position)
			require.NotZero(t, heads[1].Incarnation)
			require.Equal(t, heads[0].Incarnation, heads[1].Incarnation)
			require.Equal(t, memory.DefaultIdleExpiry, heads[0].Keep)
			require.NoError(t, b.Remove(ctx, "x"))
			again, err := b.Heads(ctx, []string{"x"})
			require.NoError(t, err)
			require.Equal(t, heads[1], again[0], "a removal leaves the incarnation as it is")
			heads, err = b.Heads(ctx, nil)
			require.NoError(t, err)
			require.Empty(t, heads)
		}},
		{"Every backend's subscription gets every entry, in order, with its own channel's only", func(t *testing.T, b *memory.Backend) {
			other := b.Store().Backend()
			r1, sub1 := subscribe(t, b, "c")
			r2, _ := subscribe(t, other, "c")
			publish(t, b, "c", frame("1"))
			publish(t, other, "c", frame("2"))
			publish(t, b, "d", frame("no"))
			_, err := other.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
			require.NoError(t, err)
			want := []string{"entry 1-1", "entry 2-2", "entry 3-3"}
			require.Equal(t, want, r1.told())
			require.Equal(t, want, r2.told())
			require.Equal(t, readAll(t, b, "c").Entries, r2.got())
			require.Equal(t, 2, b.Store().Subscriptions("c"))
			sub1.Close()
			sub1.Close()
			require.Equal(t, 1, b.Store().Subscriptions("c"))
			require.NoError(t, other.Close())
			require.Equal(t, []string{"failed"}, r2.told())
			require.Equal(t, 0, b.Store().Subscriptions("c"))
		}},
		{"A closed subscription gets nothing more", func(t *testing.T, b *memory.Backend) {
			r, sub := subscribe(t, b, "c")
			sub.Close()
			publish(t, b, "c", frame(""))
			b.Cut(nil)
			b.Heal()
			b.Store().LoseState()
			require.NoError(t, b.Close())
			require.Empty(t, r.told())
		}},
		{"After Close every call says so, a second Close is nil, and the store goes on", func(t *testing.T, b *memory.Backend) {
			r, sub := subscribe(t, b, "c")
			require.NoError(t, b.Close())
			require.Equal(t, []string{"failed"}, r.told())
			require.ErrorIs(t, r.reasons[0], dchannel.ErrBackendClosed)
			for name, call := range calls(b, "c") {
				require.ErrorIs(t, call(ctx), dchannel.ErrBackendClosed, name)
			}
			_, ok, err := b.PublishNow("c", frame(""))
			require.False(t, ok)
			require.NoError(t, err)
			b.Heal()
			require.ErrorIs(t, b.Remove(ctx, "c"), dchannel.ErrBackendClosed)
			sub.Close()
			require.NoError(t, b.Close())
			publish(t, b.Store().Backend(), "c", frame("goes on"))
		}},
		{"An ended context is returned as it is, and nothing happens", func(t *testing.T, b *memory.Backend) {
			ended, cancel := context.WithCancel(ctx)
			cancel()
			for name, call := range calls(b, "c") {
				require.Equal(t, context.Canceled, call(ended), name)
			}
			require.Zero(t, b.Store().Calls())
			require.Zero(t, b.Store().Channels())
		}},
		{"Names stay distinct, whatever they are", func(t *testing.T, b *memory.Backend) {
			for i, name := range []string{"a", "a.b", "a b", "*", ">", "{x}", "日本語", "A"} {
				publish(t, b, name, frame(name))
				require.Equal(t, []string{name}, texts(readAll(t, b, name).Entries))
				require.Equal(t, i+1, b.Store().Channels())
			}
		}},
		{"A frame without records is refused", func(t *testing.T, b *memory.Backend) {
			_, err := b.Publish(ctx, "c", dchannel.Frame{})
			require.ErrorIs(t, err, dchannel.ErrRefused)
		}},
		{"Removing what is not there is nil, and leaves nothing behind", func(t *testing.T, b *memory.Backend) {
			require.NoError(t, b.Remove(ctx, "c"))
			publish(t, b, "c", frame(""))
			require.NoError(t, b.Remove(ctx, "c"))
			require.Zero(t, b.Store().Channels())
			require.Empty(t, readAll(t, b, "c").Entries)
			require.EqualValues(t, 4, b.Store().Calls())
		}},
	} {
		t.Run(c.rule, func(t *testing.T) {
			t.Parallel()
			c.run(t, memory.New())
		})
	}
}

func TestRetentionKeepsAtLeastN(t *testing.T) {
	t.Parallel()
	b := memory.New(memory.WithRetention(10, time.Hour))
	f := frame("dropped")
	publish(t, b, "c", f)
	for i := range 100 {
		four := frame(fmt.Sprint(i))
		four.Count = 4
		publish(t, b, "c", four)
	}
	page := readAll(t, b, "c")
	require.Equal(t, []string{"97", "98", "99"}, texts(page.Entries), "12 messages: whole frames, and not fewer than 10")
	require.EqualValues(t, 401, page.Head.Seq)
	f.Age = time.Minute
	_, err := b.Publish(context.Background(), "c", f)
	require.ErrorIs(t, err, dchannel.ErrUncertain, "it was there, or not: the entries of that time are gone")
	_, err = b.MarkClosed(context.Background(), "c", dchannel.NewID(), time.Minute)
	require.NoError(t, err)
	require.Len(t, readAll(t, b, "c").Entries, 4, "the marker displaces no message")
}

func TestInvalidOptions(t *testing.T) {
	t.Parallel()
	for text, o := range map[string]memory.Option{
		"messages is 0, at least 1":                       memory.WithRetention(0, time.Minute),
		"WithRetention: the duration is 0s, at least 1ms": memory.WithRetention(1, 0),
		"WithIdleExpiry: the duration is -1s, at least 1": memory.WithIdleExpiry(-time.Second),
	} {
		b := memory.New(o)
		for name, call := range calls(b, "c") {
			err := call(context.Background())
			require.ErrorIs(t, err, dchannel.ErrInvalidOption, name)
			require.ErrorContains(t, err, text)
		}
		b.Heal()
		_, err := b.Heads(context.Background(), nil)
		require.ErrorIs(t, err, dchannel.ErrInvalidOption)
		require.NoError(t, b.Close())
	}
}
