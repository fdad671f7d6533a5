package dchannel_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// BenchmarkMemory publishes 128 bytes and waits until every listener has them: one
// operation is one message received by all.
func BenchmarkMemory(b *testing.B) {
	for _, listeners := range []int{1, 100} {
		b.Run(fmt.Sprintf("listeners=%d", listeners), func(b *testing.B) {
			backend := memory.New()
			defer backend.Close()
			benchmarkFanOut(b, backend, listeners)
		})
	}
}

func benchmarkFanOut(b *testing.B, backend dchannel.Backend, listeners int) {
	ctx := context.Background()
	var wg sync.WaitGroup
	for range listeners {
		ch, err := dchannel.Open(ctx, "bench", backend)
		if err != nil {
			b.Fatal(err)
		}
		wg.Go(func() {
			defer func() { _ = ch.Detach() }()
			for range b.N {
				if _, err := ch.Next(ctx); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	p := dchannel.New("bench", backend)
	defer func() { _ = p.Detach() }()
	msg := make([]byte, 128)
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		if err := p.Publish(ctx, msg); err != nil {
			b.Fatal(err)
		}
	}
	wg.Wait()
}
