package testserver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// slots is the number of hash slots of a Redis Cluster.
const slots = 16384

// failoverAfter is when Redis nodes give another one up: long for a busy machine, and
// short for a test that waits for it.
const failoverAfter = 2 * time.Second

// StartRedisCluster starts a Redis Cluster that is ready for all slots. The first
// nodes are the masters; behind them come the replicas, of the first master, of the
// second, and so on, around and around.
func StartRedisCluster(ctx context.Context, masters, replicas int, cfg RedisConfig) ([]*Server, error) {
	cfg.Config = append([]string{
		"cluster-enabled yes",
		"cluster-node-timeout " + millis(failoverAfter),
		"cluster-replica-validity-factor 0", // a replica that was away long may take over too
		"repl-diskless-sync-delay 0",
	}, cfg.Config...)
	if cfg.TLS != NoTLS {
		cfg.Config = append([]string{"tls-cluster yes", "tls-replication yes"}, cfg.Config...)
	}
	nodes, err := startRedis(ctx, masters+replicas, cfg)
	if err != nil {
		return nil, err
	}
	if err := formCluster(ctx, nodes, masters); err != nil {
		for _, s := range nodes {
			err = fmt.Errorf("%w%s", err, quoteLog(s.Log()))
			s.Close()
		}
		return nil, fmt.Errorf("form a Redis Cluster: %w", err)
	}
	return nodes, nil
}

func formCluster(ctx context.Context, nodes []*Server, masters int) error {
	ctx, cancel := withReadyLimit(ctx)
	defer cancel()
	for i, s := range nodes {
		// Epochs that differ from the start save the cluster from sorting them out.
		if _, err := redisDo(ctx, s, "CLUSTER", "SET-CONFIG-EPOCH", strconv.Itoa(i+1)); err != nil {
			return err
		}
		port := strconv.Itoa(nodes[0].port(0).Number())
		if _, err := redisDo(ctx, s, "CLUSTER", "MEET", "127.0.0.1", port); err != nil {
			return err
		}
	}
	for i, s := range nodes[:masters] {
		words := []string{"CLUSTER", "ADDSLOTS"}
		for slot := i * slots / masters; slot < (i+1)*slots/masters; slot++ {
			words = append(words, strconv.Itoa(slot))
		}
		if _, err := redisDo(ctx, s, words...); err != nil {
			return err
		}
	}
	for i, s := range nodes[masters:] {
		id, err := redisDo(ctx, nodes[i%masters], "CLUSTER", "MYID")
		if err != nil {
			return err
		}
		// A node knows its master by hearsay, so this takes a few rounds of gossip.
		err = poll(ctx, func() error {
			_, err := redisDo(ctx, s, "CLUSTER", "REPLICATE", id)
			return err
		})
		if err != nil {
			return err
		}
	}
	for i, s := range nodes {
		if err := poll(ctx, func() error {
			err := says(ctx, s, []string{"CLUSTER", "INFO"}, "cluster_state:ok", "cluster_known_nodes:"+strconv.Itoa(len(nodes)))
			if err == nil && i >= masters {
				err = says(ctx, s, []string{"INFO", "replication"}, "master_link_status:up")
			}
			return err
		}); err != nil {
			return err
		}
	}
	return nil
}

// RedisSentinel is a master with replicas and the sentinels that watch it.
type RedisSentinel struct {
	// Nodes are the data servers. The first one is the master to begin with.
	Nodes []*Server
	// Sentinels tell clients which node is the master.
	Sentinels []*Server
}

// SentinelMaster is the name of the master that sentinels are asked for.
const SentinelMaster = "main"

// StartRedisSentinel starts a master, replicas of it, and sentinels, of which more
// than half must agree on a failover. cfg is that of the nodes; the sentinels have
// neither TLS nor a password. A node that is restarted comes back as what it was in
// the beginning, until the sentinels tell it otherwise.
func StartRedisSentinel(ctx context.Context, replicas, sentinels int, cfg RedisConfig) (*RedisSentinel, error) {
	if cfg.TLS != NoTLS {
		return nil, fmt.Errorf("start Redis with sentinels: TLS is not supported")
	}
	r := &RedisSentinel{}
	if err := r.start(ctx, replicas, sentinels, cfg); err != nil {
		r.Close()
		return nil, fmt.Errorf("start Redis with sentinels: %w", err)
	}
	return r, nil
}

func (r *RedisSentinel) start(ctx context.Context, replicas, sentinels int, cfg RedisConfig) error {
	ctx, cancel := withReadyLimit(ctx)
	defer cancel()
	cfg.Config = append([]string{"repl-diskless-sync-delay 0"}, cfg.Config...)
	master, err := StartRedis(ctx, cfg)
	if err != nil {
		return err
	}
	r.Nodes = append(r.Nodes, master)
	number := strconv.Itoa(master.port(0).Number())
	if replicas > 0 {
		cfg.Config = append([]string{"replicaof 127.0.0.1 " + number}, cfg.Config...)
		nodes, err := startRedis(ctx, replicas, cfg)
		if err != nil {
			return err
		}
		r.Nodes = append(r.Nodes, nodes...)
	}
	conf := []string{
		"sentinel monitor " + SentinelMaster + " 127.0.0.1 " + number + " " + strconv.Itoa(sentinels/2+1),
		"sentinel down-after-milliseconds " + SentinelMaster + " " + millis(failoverAfter),
		"sentinel failover-timeout " + SentinelMaster + " " + millis(5*failoverAfter),
	}
	if cfg.Password != "" {
		conf = append(conf, "sentinel auth-pass "+SentinelMaster+" "+strconv.Quote(cfg.Password))
	}
	r.Sentinels, err = start(ctx, sentinels, kind{
		name: "sentinel", binary: master.kind.binary, ports: 1, scheme: "redis",
		args:  func(s *Server) ([]string, error) { return sentinelArgs(s, conf) },
		ready: redisReady,
	}, NoTLS)
	if err != nil {
		return err
	}
	want := fmt.Sprintf("status=ok,address=127.0.0.1:%s,slaves=%d,sentinels=%d", number, replicas, sentinels)
	for _, s := range r.Sentinels {
		if err := poll(ctx, func() error { return says(ctx, s, []string{"INFO", "sentinel"}, want) }); err != nil {
			return err
		}
	}
	return nil
}

func sentinelArgs(s *Server, lines []string) ([]string, error) {
	conf := append([]string{
		"bind 127.0.0.1",
		"port " + strconv.Itoa(s.port(0).Number()),
		"dir " + strconv.Quote(s.data()),
		"user " + probeUser + " on >" + probePassword + " +ping +info",
	}, lines...)
	name := filepath.Join(s.dir, "sentinel.conf")
	return []string{name, "--sentinel"}, os.WriteFile(name, []byte(strings.Join(conf, "\n")+"\n"), 0o600)
}

// Close closes all servers.
func (r *RedisSentinel) Close() error {
	var first error
	for _, list := range [][]*Server{r.Sentinels, r.Nodes} {
		for _, s := range list {
			if err := s.Close(); err != nil && first == nil {
				first = err
			}
		}
	}
	return first
}

func millis(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// says is nil if the reply to a command holds all the words wanted.
func says(ctx context.Context, s *Server, command []string, want ...string) error {
	reply, err := redisDo(ctx, s, command...)
	if err != nil {
		return err
	}
	for _, w := range want {
		if !strings.Contains(reply, w) {
			return fmt.Errorf("no %q in %q", w, reply)
		}
	}
	return nil
}
