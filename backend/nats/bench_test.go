package nats_test

import (
	"bytes"
	"testing"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
)

// One append in flight, as the core does it for one channel, beside the client's own
// synchronous publish of the same bytes to a plain stream.
func BenchmarkAppend(b *testing.B) {
	url := sharedServer(b)
	const records, size = 32, 128
	data := bytes.Repeat([]byte{'x'}, records*size)
	for name, subscribed := range map[string]bool{"Alone": false, "Subscribed": true} {
		b.Run(name, func(b *testing.B) {
			be := backend(b, url)
			s := newSink()
			if subscribed {
				sub, err := be.Subscribe(within(b), "c", s)
				require.NoError(b, err)
				defer sub.Close()
			}
			for b.Loop() {
				_, err := be.Publish(b.Context(), "c", dchannel.Frame{ID: dchannel.NewID(), Count: records, Data: data})
				require.NoError(b, err)
			}
			b.ReportMetric(float64(b.N*records)/b.Elapsed().Seconds(), "records/s")
			if subscribed {
				s.awaitEntries(b, b.N)
			}
		})
	}
	b.Run("JetStream", func(b *testing.B) {
		js, err := jetstream.New(connect(b, url))
		require.NoError(b, err)
		_, err = js.CreateStream(within(b), jetstream.StreamConfig{Name: "plain", Subjects: []string{"plain"}, MaxMsgsPerSubject: 16384})
		require.NoError(b, err)
		for b.Loop() {
			_, err := js.Publish(b.Context(), "plain", data)
			require.NoError(b, err)
		}
		b.ReportMetric(float64(b.N*records)/b.Elapsed().Seconds(), "records/s")
		require.NoError(b, js.DeleteStream(within(b), "plain"))
	})
}

// A free lock taken and given back, and one that another holds asked for.
func BenchmarkLock(b *testing.B) {
	be := backend(b, sharedServer(b))
	b.Run("AcquireRelease", func(b *testing.B) {
		for b.Loop() {
			token := dchannel.NewID()
			require.True(b, acquire(b, be, "free", token, hour).Mine)
			_, err := be.Release(b.Context(), "free", token)
			require.NoError(b, err)
		}
	})
	acquire(b, be, "held", dchannel.NewID(), hour)
	b.Run("Refused", func(b *testing.B) {
		for b.Loop() {
			require.False(b, acquire(b, be, "held", dchannel.NewID(), hour).Mine)
		}
	})
}
