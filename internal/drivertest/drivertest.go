// Package drivertest has the proofs that are too large for the conformance suite: many
// channels, many messages, connections that are cut all the time, servers that are
// killed. Each prints its figures. Every driver's tests call them with its own rig.
package drivertest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

// Rig is a driver and the server that it is proved on.
type Rig struct {
	Server *testserver.Server
	// Connect returns a new backend, connected to addr as another process would be.
	// It and its client end with the test.
	Connect func(t *testing.T, addr string) dchannel.Backend
}

// Tally is the result of a proof.
type Tally struct {
	Perfect    int // channels that got every message once, in order, and the close
	Duplicates int
	Missing    int    // messages that never came
	Reported   uint64 // of these, by LostErrors with a number
	Unknown    int    // channels with a LostError without a number
	Silent     int    // channels that miss something and have no LostError
	Uncertain  int    // publishes with an unknown outcome
}

func (y Tally) String() string {
	return fmt.Sprintf("perfect %d, duplicates %d, missing %d, reported %d (channels with a loss of unknown size %d), silent %d, uncertain publishes %d",
		y.Perfect, y.Duplicates, y.Missing, y.Reported, y.Unknown, y.Silent, y.Uncertain)
}

// Load has one process publish messages on many channels and another one listen to
// all of them, while disturb does its worst until its context ends, and counts.
func Load(t *testing.T, rig Rig, addr string, channels, messages int, pace time.Duration, disturb func(ctx context.Context)) Tally {
	ctx, done := context.WithTimeout(t.Context(), 3*time.Minute)
	defer done()
	listening, publishing := rig.Connect(t, addr), rig.Connect(t, addr)
	var y Tally
	var listeners, publishers sync.WaitGroup
	name := func(c int) string { return fmt.Sprintf("load-%d", c) }

	var handles []*dchannel.Channel
	for c := range channels {
		ch, err := dchannel.Open(ctx, name(c), listening)
		require.NoError(t, err)
		handles = append(handles, ch)
	}
	sent := make([]map[int]bool, channels) // accepted for sure
	maybe := make([]map[int]bool, channels)
	for c := range channels {
		sent[c], maybe[c] = map[int]bool{}, map[int]bool{}
	}
	type result struct {
		got      map[int]int
		disorder bool
		closed   bool
		lost     uint64
		unknown  int
		last     int
	}
	results := make([]result, channels)
	for c, ch := range handles {
		listeners.Go(func() {
			defer func() { _ = ch.Detach() }()
			r := &results[c]
			r.got, r.last = map[int]int{}, -1
			for {
				var n int
				m, err := ch.Next(ctx)
				var lost *dchannel.LostError
				switch {
				case errors.As(err, &lost):
					if r.lost += lost.Count; lost.Count == 0 {
						r.unknown++
					}
					continue
				case errors.Is(err, dchannel.ErrChanClosed):
					r.closed = true
					return
				case err != nil:
					t.Errorf("%s: %v", ch.Name(), err)
					return
				}
				if err := m.Decode(&n); err != nil {
					t.Errorf("%s: %v", ch.Name(), err)
					return
				}
				r.got[n]++
				if n <= r.last {
					r.disorder = true
				}
				r.last = n
			}
		})
	}
	faults, calm := context.WithCancel(ctx)
	var disturbing sync.WaitGroup
	disturbing.Go(func() { disturb(faults) })
	for c := range channels {
		publishers.Go(func() {
			ch := dchannel.New(name(c), publishing, dchannel.WithTimeout(time.Minute))
			defer func() { _ = ch.Detach() }()
			tick := time.NewTicker(pace)
			defer tick.Stop()
			for n := range messages {
				<-tick.C
				switch err := ch.Publish(ctx, n); {
				case err == nil:
					sent[c][n] = true
				case errors.Is(err, dchannel.ErrUncertain):
					maybe[c][n] = true
				default:
					t.Errorf("%s: publish %d: %v", ch.Name(), n, err)
				}
			}
		})
	}
	publishers.Wait()
	calm()
	disturbing.Wait()
	for c := range channels {
		publishers.Go(func() {
			ch := dchannel.New(name(c), publishing, dchannel.WithTimeout(time.Minute))
			assert.NoError(t, ch.Close())
		})
	}
	publishers.Wait()
	listeners.Wait()

	for c, r := range results {
		missing, duplicates := 0, 0
		for n := range messages {
			switch got := r.got[n]; {
			case got > 1:
				duplicates += got - 1
			case got == 0 && sent[c][n]:
				missing++
			}
		}
		y.Duplicates += duplicates
		y.Missing += missing
		y.Reported += r.lost
		y.Uncertain += len(maybe[c])
		if r.unknown > 0 {
			y.Unknown++
		}
		if missing > 0 && r.lost == 0 && r.unknown == 0 {
			y.Silent++
		}
		if missing == 0 && duplicates == 0 && !r.disorder && r.closed && r.lost == 0 && r.unknown == 0 {
			y.Perfect++
		} else if r.disorder {
			t.Errorf("%s: out of order", name(c))
		}
	}
	return y
}

// Cut cuts all connections every 100 to 400 ms under load. Nothing may happen to any
// channel.
func Cut(t *testing.T, rig Rig, channels, messages int) {
	proxy, err := faultproxy.New(rig.Server.Addr())
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, proxy.Close()) })
	y := Load(t, rig, proxy.Addr(), channels, messages, 10*time.Millisecond, func(ctx context.Context) {
		for pause(ctx, 100*time.Millisecond+rand.N(300*time.Millisecond)) {
			proxy.Cut()
		}
	})
	t.Logf("cut %d times (%d connections), %d channels × %d messages: %v", proxy.Cuts(), proxy.Accepted(), channels, messages, y)
	require.Equal(t, Tally{Perfect: channels}, y)
}

// Kill kills the server with SIGKILL under load, and starts it again with its data.
// Nothing may happen to any channel.
func Kill(t *testing.T, rig Rig, channels, messages, times int) {
	y := Load(t, rig, rig.Server.Addr(), channels, messages, 10*time.Millisecond, func(ctx context.Context) {
		for range times {
			if !pause(ctx, 300*time.Millisecond) {
				return
			}
			assert.NoError(t, rig.Server.Kill())
			assert.NoError(t, rig.Server.Restart(t.Context()))
		}
	})
	t.Logf("killed and restarted with its data, %d channels × %d messages: %v", channels, messages, y)
	require.Equal(t, Tally{Perfect: channels}, y)
}

// LoseAll has restart take the server's data away under load. Who misses anything must
// be told.
func LoseAll(t *testing.T, rig Rig, channels, messages int, restart func()) {
	y := Load(t, rig, rig.Server.Addr(), channels, messages, 5*time.Millisecond, func(ctx context.Context) {
		if pause(ctx, 300*time.Millisecond) {
			restart()
		}
	})
	t.Logf("restarted without its data, %d channels × %d messages: %v", channels, messages, y)
	require.Zero(t, y.Silent)
	require.Zero(t, y.Duplicates)
	require.Equal(t, channels, y.Unknown, "channels that were told that state was lost")
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Many attaches n channels with one handle each in this process and prints what that
// costs. connections tells how many the server has.
func Many(t *testing.T, rig Rig, n, maxConnections, maxHeap int, connections func() int) {
	b := rig.Connect(t, rig.Server.Addr())
	ctx, done := context.WithTimeout(t.Context(), 2*time.Minute)
	defer done()
	// The connections and whatever else is once per backend is not counted per channel.
	warm, err := dchannel.Open(ctx, "warm", b)
	require.NoError(t, err)
	require.NoError(t, warm.Publish(ctx, "warm"))
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("many-%06d", i)
	}
	handles := make([]*dchannel.Channel, n)
	heap, goroutines := settled()
	start := time.Now()
	var wg sync.WaitGroup
	for part := range 100 {
		wg.Go(func() {
			for i := part; i < n; i += 100 {
				ch, err := dchannel.Open(ctx, names[i], b)
				if !assert.NoError(t, err) {
					return
				}
				handles[i] = ch
			}
		})
	}
	wg.Wait()
	attach := time.Since(start)
	if t.Failed() {
		return
	}
	heapAfter, goroutinesAfter := settled()
	perChannel := int(heapAfter-heap) / n
	// Every one of them works.
	p := dchannel.New(names[n-1], b)
	require.NoError(t, p.Publish(ctx, "to the last"))
	require.NoError(t, p.Detach())
	v, err := handles[n-1].Listen(ctx)
	require.NoError(t, err)
	require.Equal(t, "to the last", v)
	var conns int
	assert.Eventually(t, func() bool { conns = connections(); return conns <= maxConnections },
		10*time.Second, 10*time.Millisecond, "more than %d connections at rest", maxConnections)
	t.Logf("%d channels: %d connections, %+d goroutines in all, %d bytes of heap per channel, attached in %v",
		n, conns, goroutinesAfter-goroutines, perChannel, attach.Round(time.Millisecond))
	assert.Less(t, goroutinesAfter-goroutines, 10)
	if !race {
		assert.LessOrEqual(t, perChannel, maxHeap)
	}
	for _, ch := range handles {
		wg.Go(func() { assert.NoError(t, ch.Detach()) })
	}
	wg.Wait()
	require.NoError(t, warm.Detach())
	runtime.KeepAlive(names)
}

// settled measures heap and goroutines once they stand still.
func settled() (heap int64, goroutines int) {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc), runtime.NumGoroutine()
}

// OneUpstream opens n handles on one channel: the server must see one subscription,
// and none when all are detached.
func OneUpstream(t *testing.T, rig Rig, n int, upstreams func(channel string) int) {
	b := rig.Connect(t, rig.Server.Addr())
	ctx, done := context.WithTimeout(t.Context(), time.Minute)
	defer done()
	var handles []*dchannel.Channel
	for range n {
		ch, err := dchannel.Open(ctx, "one", b)
		require.NoError(t, err)
		handles = append(handles, ch)
	}
	up := upstreams("one")
	require.NoError(t, handles[0].Publish(ctx, "x"))
	for _, ch := range handles {
		_, err := ch.Listen(ctx)
		require.NoError(t, err)
	}
	for _, ch := range handles {
		require.NoError(t, ch.Detach())
	}
	require.Eventually(t, func() bool { return upstreams("one") == 0 }, 5*time.Second, 5*time.Millisecond)
	t.Logf("%d handles on one channel: %d upstream; after Detach of all: %d", n, up, upstreams("one"))
	require.Equal(t, 1, up)
}
