package memory_test

import (
	"context"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

func TestMessagesExpireBeforeTheirNumbers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := memory.New(memory.WithRetention(100, time.Minute), memory.WithIdleExpiry(time.Hour))
		first := frame("first")
		publish(t, b, "c", first)
		time.Sleep(30 * time.Second)
		pos := publish(t, b, "c", frame("second"))
		time.Sleep(30 * time.Second)
		require.Len(t, readAll(t, b, "c").Entries, 2, "a minute old")
		time.Sleep(time.Millisecond)
		require.Equal(t, []string{"second"}, texts(readAll(t, b, "c").Entries))
		time.Sleep(30 * time.Second)
		page := readAll(t, b, "c")
		require.Empty(t, page.Entries)
		require.Equal(t, pos, page.Head.Position, "so that what is missing can be counted")

		first.Age = 2 * time.Minute
		_, err := b.Publish(context.Background(), "c", first)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		third := frame("third")
		third.Age = 10 * time.Second
		require.EqualValues(t, 3, publish(t, b, "c", third).Seq, "nothing that young has been dropped")

		time.Sleep(time.Hour)
		require.EqualValues(t, 3, readAll(t, b, "c").Head.Seq)
		require.Equal(t, 1, b.Store().Channels())
		time.Sleep(time.Millisecond)
		require.Zero(t, readAll(t, b, "c").Head.Position)
		require.Zero(t, b.Store().Channels())
		next := publish(t, b, "c", frame("anew"))
		require.EqualValues(t, 1, next.Seq)
		require.Greater(t, next.Epoch, pos.Epoch)
	})
}

func TestClosedLogLivesForKeep(t *testing.T) {
	t.Parallel()
	for _, keep := range []time.Duration{0, time.Second, 5 * time.Second, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			b := memory.New(memory.WithRetention(100, time.Minute))
			f := frame("m")
			publish(t, b, "c", f)
			_, err := b.MarkClosed(context.Background(), "c", dchannel.NewID(), keep)
			require.NoError(t, err)
			keep := max(keep, time.Second)
			time.Sleep(keep)
			page := readAll(t, b, "c")
			require.Len(t, page.Entries, 2, "whatever the retention")
			require.Equal(t, keep, page.Head.Keep)
			time.Sleep(time.Millisecond)
			require.Zero(t, readAll(t, b, "c").Head.Position)
			require.Zero(t, b.Store().Channels())
			f.Age = keep + time.Minute
			_, err = b.Publish(context.Background(), "c", f)
			require.ErrorIs(t, err, dchannel.ErrUncertain)
			require.EqualValues(t, 1, publish(t, b, "c", frame("open again")).Seq)
		})
	}
}

func TestIdleExpiryIsNotShorterThanRetention(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := memory.New(memory.WithIdleExpiry(time.Second), memory.WithRetention(100, time.Minute))
		publish(t, b, "c", frame("m"))
		time.Sleep(time.Minute)
		require.Len(t, readAll(t, b, "c").Entries, 1)
		time.Sleep(time.Millisecond)
		require.Zero(t, b.Store().Channels())
	})
}

// TestSweepFreesUnusedChannels: memory goes back without anybody calling.
func TestSweepFreesUnusedChannels(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := memory.New(memory.WithRetention(100, time.Minute), memory.WithIdleExpiry(time.Hour))
		payload := new([1 << 16]byte)
		freed := weak.Make(payload)
		publish(t, b, "c", dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: payload[:]})
		payload = nil
		_, err := b.MarkClosed(context.Background(), "closed", dchannel.NewID(), time.Second)
		require.NoError(t, err)
		time.Sleep(time.Minute - time.Second)
		runtime.GC()
		require.NotNil(t, freed.Value())
		time.Sleep(10 * time.Second)
		synctest.Wait()
		runtime.GC()
		require.Nil(t, freed.Value())
		require.Equal(t, 1, memory.Slots(b.Store()), "the closed channel is gone")
		require.True(t, memory.Sweeping(b.Store()))
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		require.Zero(t, memory.Slots(b.Store()))
		require.False(t, memory.Sweeping(b.Store()), "no timer without anything to expire")
	})
}

// TestSweepComesInTime: for a message and for a marker behind one, each alone.
func TestSweepComesInTime(t *testing.T) {
	t.Parallel()
	for _, closed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := memory.New(memory.WithRetention(100, time.Minute), memory.WithIdleExpiry(time.Minute))
			publish(t, b, "c", frame("m"))
			lives := time.Minute
			if closed {
				lives = time.Second
				_, err := b.MarkClosed(context.Background(), "c", dchannel.NewID(), lives)
				require.NoError(t, err)
			}
			time.Sleep(lives + 2*time.Minute/16)
			synctest.Wait()
			require.Zero(t, memory.Held(b.Store()))
		})
	}
}

// TestNothingStays: what a channel leaves in the map goes too, the memory of a
// removal after the retention.
func TestNothingStays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := memory.New(memory.WithRetention(100, time.Minute))
		_, sub := subscribe(t, b, "quiet")
		require.Equal(t, 1, memory.Slots(b.Store()))
		sub.Close()
		readAll(t, b, "read")
		require.Zero(t, memory.Slots(b.Store()))
		_, sub = subscribe(t, b, "removed")
		publish(t, b, "removed", frame("m"))
		require.NoError(t, b.Remove(context.Background(), "removed"))
		sub.Close()
		require.Zero(t, b.Store().Channels())
		require.Equal(t, 1, memory.Slots(b.Store()))
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.Zero(t, memory.Slots(b.Store()))
		require.False(t, memory.Sweeping(b.Store()))
	})
}

// TestUnreachableStoreIsFreed: a pending timer holds no store.
func TestUnreachableStoreIsFreed(t *testing.T) {
	t.Parallel()
	s := memory.NewStore()
	publish(t, s.Backend(), "c", frame("m"))
	p := weak.Make(s)
	s = nil
	require.Eventually(t, func() bool { runtime.GC(); return p.Value() == nil }, 10*time.Second, time.Millisecond)
}
