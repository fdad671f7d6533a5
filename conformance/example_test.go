package conformance_test

import (
	"testing"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/conformance"
)

// A driver's test calls Run with what it can do to its server. A store of the memory
// backend stands for the server here; New makes one more process's backend on it. What is
// left out of the Harness is reported as NOT COVERED.
func ExampleRun() {
	_ = func(t *testing.T) { // in a file of the driver: func TestConformance(t *testing.T)
		server := memory.NewStore()
		conformance.Run(t, conformance.Harness{
			New: func(testing.TB) dchannel.Backend { return server.Backend() },
			Cut: func(_ testing.TB, b dchannel.Backend) (heal func()) {
				b.(*memory.Backend).Cut(nil)
				return b.(*memory.Backend).Heal
			},
			LoseReply: func(_ testing.TB, b dchannel.Backend, _ string) { b.(*memory.Backend).LoseReplies(1) },
			LoseState: func(testing.TB) { server.LoseState() },
			Upstreams: func(_ testing.TB, channel string) int { return server.Subscriptions(channel) },
			Calls:     func(testing.TB) int { return int(server.Calls()) },
		})
	}
}
