package memory_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

// countingSink is the cheapest sink there is.
type countingSink struct{ entries int }

func (s *countingSink) Entry(dchannel.Entry)        { s.entries++ }
func (s *countingSink) Resync(error)                {}
func (s *countingSink) State(dchannel.State, error) {}

// BenchmarkPublish appends frames of one record, with one subscriber.
func BenchmarkPublish(b *testing.B) {
	be := memory.New()
	defer be.Close()
	sink := new(countingSink)
	sub, err := be.Subscribe(b.Context(), "bench", sink)
	if err != nil {
		b.Fatal(err)
	}
	defer sub.Close()
	f := dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: make([]byte, 64)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := be.Publish(b.Context(), "bench", f); err != nil {
			b.Fatal(err)
		}
	}
	if sink.entries != b.N {
		b.Fatalf("%d entries pushed, want %d", sink.entries, b.N)
	}
}

// BenchmarkPublishParallel has 64 publishers, on one channel or on one each.
func BenchmarkPublishParallel(b *testing.B) {
	for _, channels := range []int{1, 64} {
		b.Run(fmt.Sprintf("channels=%d", channels), func(b *testing.B) {
			be := memory.New(memory.WithRetention(1024, time.Minute))
			defer be.Close()
			var next atomic.Int64
			b.SetParallelism(64)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				name := fmt.Sprintf("bench-%d", next.Add(1)%int64(channels))
				f := dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: make([]byte, 64)}
				for pb.Next() {
					if _, _, err := be.PublishNow(name, f); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkRead reads a page of 100 entries from the middle of a full log.
func BenchmarkRead(b *testing.B) {
	be := memory.New()
	defer be.Close()
	var pos dchannel.Position
	for range memory.DefaultRetentionMessages {
		var err error
		pos, err = be.Publish(b.Context(), "bench", dchannel.Frame{ID: dchannel.NewID(), Count: 1, Data: make([]byte, 64)})
		if err != nil {
			b.Fatal(err)
		}
	}
	pos.Seq /= 2
	b.ReportAllocs()
	for b.Loop() {
		page, err := be.Read(b.Context(), "bench", pos, 6400)
		if err != nil || len(page.Entries) != 100 {
			b.Fatal(len(page.Entries), err)
		}
	}
}
