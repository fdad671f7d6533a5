package etcd_test

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
)

type quietSink struct{ got chan string }

func (q *quietSink) Entry(e dchannel.Entry)    { q.got <- string(e.Data) }
func (*quietSink) Resync(error)                {}
func (*quietSink) State(dchannel.State, error) {}

func TestTenThousandSubscriptions(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	first, err := b.Subscribe(t.Context(), "first", newSink())
	require.NoError(t, err)
	defer first.Close()
	const n = 10_000
	k := &quietSink{got: make(chan string, n)}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	goroutines, began := runtime.NumGoroutine(), time.Now()
	subs := make([]dchannel.Subscription, n)
	for i := range n {
		subs[i], err = b.Subscribe(t.Context(), fmt.Sprint("channel-", i), k)
		require.NoError(t, err)
	}
	took := time.Since(began)
	require.LessOrEqual(t, runtime.NumGoroutine(), goroutines+1)
	runtime.GC()
	runtime.ReadMemStats(&after)
	t.Logf("%d subscriptions in %v, %d bytes each, %d goroutines", n, took, (after.HeapAlloc-before.HeapAlloc)/n, runtime.NumGoroutine())
	for i := 0; i < n; i += 1000 {
		publish(t, b, fmt.Sprint("channel-", i), fmt.Sprint(i))
		select {
		case got := <-k.got:
			require.Equal(t, fmt.Sprint(i), got)
		case <-time.After(patience):
			require.FailNow(t, "no push")
		}
	}
	began = time.Now()
	for _, s := range subs {
		s.Close()
	}
	t.Log("closed in", time.Since(began))
}

// TestSubscribeAndClose: nothing comes after Close, whatever is on its way.
func TestSubscribeAndClose(t *testing.T) {
	b := backend(t, connect(t, server(t).URL()))
	stop := stream(t, b, "a")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 50 {
				k := newSink()
				sub, err := b.Subscribe(t.Context(), "a", k)
				if err != nil {
					t.Error(err)
					return
				}
				k.await(t, "push", k.count(1))
				sub.Close()
				k.mu.Lock()
				have := len(k.entries)
				k.mu.Unlock()
				runtime.Gosched()
				k.mu.Lock()
				if len(k.entries) != have {
					t.Error("a push after Close")
				}
				k.mu.Unlock()
			}
		})
	}
	wg.Wait()
	stop()
}

func TestNamespacesAreSeparate(t *testing.T) {
	c := connect(t, server(t).URL())
	for _, ns := range []string{"x", "x/y", "/x", "x//", "日本"} {
		b := backend(t, c, etcd.WithNamespace(ns))
		k := subscribe(t, b, "a")
		require.EqualValues(t, 1, publish(t, b, "a", ns).Seq, ns)
		k.await(t, "push", k.count(1))
	}
}
