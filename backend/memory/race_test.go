package memory_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// TestEverythingAtOnce publishes through faults, trying again as the core does, and
// then takes the logs to account: each frame once, each publisher's in its order,
// numbers and links unbroken, and each sink told what it missed.
func TestEverythingAtOnce(t *testing.T) {
	t.Parallel()
	const publishers, frames, channels = 8, 300, 3
	s := memory.NewStore(memory.WithRetention(1<<20, time.Hour))
	name := func(i int) string { return fmt.Sprint("c", i%channels) }
	ctx, cancel := context.WithCancel(context.Background())
	var publishing, faults sync.WaitGroup
	backends := make([]*memory.Backend, publishers)
	sinks := make([]*recorder, publishers)
	for i := range publishers {
		backends[i] = s.Backend()
		sinks[i], _ = subscribe(t, backends[i], name(i))
		publishing.Go(func() {
			for n := range frames {
				f := frame(fmt.Sprintf("%d %d", i, n))
				f.Count = 1 + n%3
				began := time.Now()
				for f.Age = 0; ; f.Age = time.Since(began) {
					var err error
					ok := false
					if n%2 == 0 {
						_, ok, err = backends[i].PublishNow(name(i), f)
					}
					if !ok {
						short, done := context.WithTimeout(ctx, 50*time.Microsecond)
						_, err = backends[i].Publish(short, name(i), f)
						done()
					}
					if err == nil {
						break
					}
				}
			}
		})
	}
	for _, fault := range []func(i int){
		func(i int) { backends[i%publishers].Cut(nil); backends[i%publishers].Heal() },
		func(int) { s.Pause(); time.Sleep(100 * time.Microsecond); s.Resume() },
		func(i int) { backends[i%publishers].LoseReplies(3); backends[i%publishers].DropPushes(2) },
		func(i int) {
			sub, err := backends[i%publishers].Subscribe(ctx, fmt.Sprint("brief", i%5), new(recorder))
			if err == nil {
				sub.Close()
			}
		},
		func(i int) {
			gone := fmt.Sprint("gone", i%5)
			_, _ = backends[0].Publish(ctx, gone, frame(""))
			_ = backends[1].Remove(ctx, gone)
			_, _ = backends[2].Heads(ctx, []string{gone, name(i)})
			_ = s.Channels()
		},
	} {
		faults.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				fault(i)
				time.Sleep(50 * time.Microsecond)
			}
		})
	}
	publishing.Wait()
	cancel()
	faults.Wait()

	total := 0
	for c := range channels {
		page := readAll(t, backends[0], name(c))
		next := make(map[int]int)
		var prev dchannel.Entry
		for _, e := range page.Entries {
			total++
			var who, n int
			_, err := fmt.Sscan(string(e.Data), &who, &n)
			require.NoError(t, err)
			require.Equal(t, next[who], n, "once, and in the publisher's order")
			next[who]++
			require.Equal(t, prev.Seq+1, e.First())
			require.Equal(t, prev.ID, e.Prev)
			prev = e
		}
		require.Equal(t, prev.Position, page.Head.Position)
		for i := c; i < publishers; i += channels {
			missing := uint64(0)
			at := uint64(0)
			resyncs := slices.Contains(sinks[i].told(), "resync")
			for _, e := range sinks[i].got() {
				require.GreaterOrEqual(t, e.First(), at+1)
				missing += e.First() - at - 1
				at = e.Seq
			}
			require.True(t, missing == 0 || resyncs)
		}
	}
	require.Equal(t, publishers*frames, total)
	for _, b := range backends {
		require.NoError(t, b.Close())
	}
	require.Zero(t, s.Subscriptions("c0"))
}

// TestStateLossIsSeenWhole: no reply pairs a log with the wrong incarnation.
func TestStateLossIsSeenWhole(t *testing.T) {
	t.Parallel()
	s := memory.NewStore()
	b := s.Backend()
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	for range 2 {
		work.Go(func() {
			for ctx.Err() == nil {
				_, _ = b.Publish(ctx, "c", frame(""))
				runtime.Gosched()
			}
		})
	}
	work.Go(func() { // the detector looks for the incarnation being read while it changes
		for ctx.Err() == nil {
			_, _ = b.Heads(ctx, []string{"no log"})
			s.LoseLast("no log either", 1)
			runtime.Gosched()
		}
	})
	epochs := make(map[dchannel.ID]uint64)
	for range 300 {
		for range 10 {
			h := readAll(t, b, "c").Head
			if h.Epoch == 0 {
				continue
			}
			if known := epochs[h.Incarnation]; known != 0 {
				require.Equal(t, known, h.Epoch)
			}
			epochs[h.Incarnation] = h.Epoch
		}
		s.LoseState()
	}
	cancel()
	work.Wait()
}

// TestPauseIsWhole: when Pause has returned nothing happens any more, and nothing
// overtakes what was waiting when Resume does it.
func TestPauseIsWhole(t *testing.T) {
	t.Parallel()
	const rounds, others = 100, 200
	s := memory.NewStore(memory.WithRetention(1<<20, time.Hour))
	b := s.Backend()
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	for range 2 {
		work.Go(func() {
			for ctx.Err() == nil {
				_, _ = b.Publish(ctx, "busy", frame(""))
				runtime.Gosched()
			}
		})
	}
	sink, _ := subscribe(t, b, "busy")
	for range rounds {
		s.Pause()
		before := len(sink.got())
		ended, end := context.WithTimeout(ctx, 100*time.Microsecond)
		var late sync.WaitGroup
		for range others { // work for Resume
			late.Go(func() { _, _ = b.Publish(ended, "late", frame("")) })
		}
		late.Wait()
		f := frame("")
		_, _ = b.Publish(ended, "late", f)
		end()
		require.Len(t, sink.got(), before)
		f.Age = time.Millisecond
		work.Go(func() {
			for ok := false; !ok; {
				runtime.Gosched()
				_, ok, _ = b.PublishNow("late", f)
			}
		})
		s.Resume()
	}
	cancel()
	work.Wait()
	seen := make(map[dchannel.ID]bool)
	for _, e := range readAll(t, b, "late").Entries {
		require.False(t, seen[e.ID], "appended twice")
		seen[e.ID] = true
	}
}
