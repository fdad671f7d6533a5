package etcd_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/etcd"
	"github.com/dchannel/dchannel/internal/drivertest"
	"github.com/dchannel/dchannel/internal/lockproof"
	"github.com/dchannel/dchannel/internal/locktest"
)

// openInChild connects in the processes that the proofs of the locks start.
func openInChild(addr string) (dchannel.Backend, error) {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + addr}})
	if err != nil {
		return nil, err
	}
	return etcd.New(client), nil
}

// The shortest TTL of a lease is 2 s, so there are fewer rounds than on other servers.

func TestLockProofStoppedHolders(t *testing.T) {
	t.Parallel()
	s := server(t)
	lockproof.StoppedHolders(t, rig(s), 2*time.Second, 4)
}

func TestLockProofKilledHolders(t *testing.T) {
	t.Parallel()
	lockproof.KilledHolders(t, rig(server(t)), 2*time.Second, time.Second, 4, true, 1500*time.Millisecond)
}

func TestLockProofWakeUps(t *testing.T) {
	t.Parallel()
	s := server(t)
	r := rig(s)
	lockproof.WakeUps(t, func() dchannel.Backend { return r.Connect(t, s.Addr()) }, 500, 2*time.Second)
}

func TestLockProofTwoHundredContenders(t *testing.T) {
	t.Parallel()
	lockproof.TwoHundredContenders(t, rig(server(t)), map[string]float64{"wait": 10, "fair": 1.1})
}

func TestMutex(t *testing.T) {
	drivertest.Mutex(t, rig(server(t)))
}

// The server gives at least 2 s and looks for what is over every half a second, so this
// takes its time to see some expire.
func TestLockProofLinearizable(t *testing.T) {
	r := rig(server(t))
	report := locktest.Check(t, func() dchannel.Backend { return r.Connect(t, r.Server.Addr()) },
		locktest.Config{Channels: 30, For: 12 * time.Second, TTL: 2 * time.Second, Late: 1500 * time.Millisecond})
	require.Positive(t, report.Expiries)
}
