package etcd_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/testserver"
)

// The benchmarks' server syncs to disk, as real ones do.
func benchClient(b *testing.B) *clientv3.Client {
	return connect(b, testserver.EtcdForTest(b, testserver.EtcdConfig{Args: []string{
		"--quota-backend-bytes=8589934592", "--auto-compaction-mode=revision", "--auto-compaction-retention=1000",
	}}).URL())
}

const benchPayload = 128

func perSecond(b *testing.B, messages int) {
	b.ReportMetric(float64(b.N*messages)/b.Elapsed().Seconds(), "msg/s")
}

// BenchmarkAppend has one frame in flight, as the core does for each channel.
func BenchmarkAppend(b *testing.B) {
	for _, records := range []int{1, 32, 64, 100, 1000} {
		for _, subscribed := range []bool{false, true} {
			b.Run(fmt.Sprintf("records=%d/subscribed=%t", records, subscribed), func(b *testing.B) {
				be := etcd.New(benchClient(b))
				defer be.Close()
				k := newSink()
				if subscribed {
					sub, err := be.Subscribe(b.Context(), "bench", k)
					require.NoError(b, err)
					defer sub.Close()
				}
				for b.Loop() {
					_, err := be.Publish(b.Context(), "bench", frame(string(make([]byte, records*benchPayload)), records))
					require.NoError(b, err)
				}
				if subscribed {
					k.await(b, "all pushed", k.count(b.N))
				}
				perSecond(b, records)
			})
		}
	}
}

// BenchmarkPut is the client alone: one key a message, from many goroutines.
func BenchmarkPut(b *testing.B) {
	for _, goroutines := range []int{1, 64} {
		b.Run(fmt.Sprintf("goroutines=%d", goroutines), func(b *testing.B) {
			c := benchClient(b)
			value := string(make([]byte, benchPayload))
			b.SetParallelism(max(goroutines/4, 1)) // times GOMAXPROCS
			if goroutines == 1 {
				for b.Loop() {
					_, err := c.Put(b.Context(), dchannel.NewID().String(), value)
					require.NoError(b, err)
				}
			} else {
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if _, err := c.Put(b.Context(), dchannel.NewID().String(), value); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			perSecond(b, 1)
		})
	}
}

// BenchmarkTxnOfPuts puts 100 keys in a transaction.
func BenchmarkTxnOfPuts(b *testing.B) {
	c := benchClient(b)
	value := string(make([]byte, benchPayload))
	for b.Loop() {
		var ops []clientv3.Op
		for range 100 {
			ops = append(ops, clientv3.OpPut(dchannel.NewID().String(), value))
		}
		_, err := c.Txn(b.Context()).Then(ops...).Commit()
		require.NoError(b, err)
	}
	perSecond(b, 100)
}
